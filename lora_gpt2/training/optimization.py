"""AdamW and the six schedules as functions of the optimizer step."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lora_gpt2.training.config import OptimizerSettings, Schedule


def rate_factor(step: int, total: int, settings: OptimizerSettings) -> float:
    """The share of the highest learning rate at optimizer step `step` of `total`, both counted from 0.

    Rises linearly from 0 over the warm-up; then falls to 0 linearly or by a half cosine, or with the
    inverse square root of the step, or stays (constant, plateau), or saws from 1 to 0 (cyclic).
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    match settings.schedule:
        case Schedule.linear:
            return 1 - progress
        case Schedule.cosine:
            return 0.5 * (1 + math.cos(math.pi * progress))
        case Schedule.inverse_sqrt:
            return math.sqrt(max(1, warmup) / max(1, step))
        case Schedule.cyclic:
            return 1 - (step - warmup) % settings.cycle_steps / settings.cycle_steps
        case _:
            return 1.0


def build_optimizer(
    trained: Iterable[tuple[Iterable[tuple[str, nn.Parameter]], OptimizerSettings]],
    total: int,
    fused: bool = True,
) -> tuple[AdamW, LambdaLR]:
    """AdamW over named parameters, each set by settings of its own, and the schedule over `total` steps.

    The first group of a set has the rate `lr`; LoRA's B is a group of its own where `lora_plus_ratio` asks
    for it.
    """
    pairs = [(group, settings) for named, settings in trained for group in _groups(list(named), settings)]
    optimizer = AdamW([group for group, _ in pairs], fused=fused)
    courses: list[Callable[[int], float]] = [
        partial(rate_factor, total=total, settings=settings) for _, settings in pairs
    ]
    return optimizer, LambdaLR(optimizer, courses)


def _groups(named: list[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> list[dict[str, Any]]:
    faster = {name for name, _ in named if name.endswith("lora_B") and settings.lora_plus_ratio != 1}
    how = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name not in faster], "lr": settings.lr, **how}
    ]
    if faster:
        rate = settings.lora_plus_ratio * settings.lr
        groups.append({"params": [p for name, p in named if name in faster], "lr": rate, **how})
    return groups
