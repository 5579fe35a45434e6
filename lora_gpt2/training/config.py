"""The group `optimizer`: AdamW and the course of its learning rate."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Schedule(str, Enum):
    """The learning rate after warm-up, over the optimizer steps that remain."""

    linear = "linear"
    cosine = "cosine"
    inverse_sqrt = "inverse_sqrt"
    constant = "constant"
    cyclic = "cyclic"
    plateau = "plateau"


def listed(value: Any) -> list[Any]:
    """A setting's values, where it may be one or a list."""
    return value if isinstance(value, list) else [value]


@dataclass
class OptimizerSettings:
    lr: Any = 2e-4
    """Highest learning rate. A number, or a list for several adapters at once."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """On every trained parameter, as the paper does."""
    lora_plus_ratio: float = 1.0
    """The rate of B is this many times that of A (LoRA+, Hayou et al. 2024); 1: plain LoRA."""
    schedule: Schedule = Schedule.linear
    """linear, cosine, inverse_sqrt, constant, cyclic, or plateau."""
    warmup_steps: int = 500
    """Optimizer steps of linear rise from 0."""
    cycle_steps: int = 1000
    """cyclic: optimizer steps of one fall from the highest rate to 0."""
    plateau_factor: float = 0.5
    """plateau: the rate is multiplied by this ..."""
    plateau_patience: int = 1
    """plateau: ... after more than this many validations without a lower loss."""

    def __post_init__(self) -> None:
        checks = {
            "lr": (all(0 < rate < math.inf for rate in listed(self.lr)), "above 0, and finite"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "in [0, 1)"),
            "eps": (0 < self.eps < math.inf, "above 0, and finite"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0, and finite"),
            "lora_plus_ratio": (0 < self.lora_plus_ratio < math.inf, "above 0, and finite"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "cycle_steps": (self.cycle_steps >= 1, "at least 1"),
            "plateau_factor": (0 < self.plateau_factor < 1, "between 0 and 1"),
            "plateau_patience": (self.plateau_patience >= 0, "at least 0"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"optimizer.{name} must be {expected}, not {getattr(self, name)}")
