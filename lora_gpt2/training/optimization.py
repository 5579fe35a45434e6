"""AdamW and the six schedules as functions of the optimizer step."""

import math
from collections.abc import Iterable
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
    parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, total: int
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the named `parameters` and its schedule over `total` optimizer steps.

    The first group has the rate `lr`; LoRA's B is a group of its own where `lora_plus_ratio` asks for it.
    """
    named = list(parameters)
    faster = {name for name, _ in named if name.endswith("lora_B") and settings.lora_plus_ratio != 1}
    groups: list[dict[str, Any]] = [{"params": [p for name, p in named if name not in faster]}]
    if faster:
        rate = settings.lora_plus_ratio * settings.lr
        groups.append({"params": [p for name, p in named if name in faster], "lr": rate})
    optimizer = AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return optimizer, LambdaLR(optimizer, lambda step: rate_factor(step, total, settings))
