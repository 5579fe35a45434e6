"""GELU by its tanh formula (Hendrycks and Gimpel 2016), as GPT-2 has it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def compiled_gelu(x: Tensor) -> Tensor:
    """`gelu` for training on a CPU: value and slope in one compiled loop.

    0.5 (1 + tanh u) is taken as the logistic function of 2 u, which costs less.
    """
    result: Tensor = _Gelu.apply(x) if x.requires_grad else gelu(x)  # type: ignore[no-untyped-call]
    return result


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, slope = _compiled()(x)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return upstream[0] * slope


@cache
def _compiled() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_value_and_slope, dynamic=True)


def _value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) and its derivative, of the type of `x`, computed in float32."""
    z = x.float()
    a, b = 1.5957691216057308, 0.0713548162726009  # 2 sqrt(2 / pi), and that times 0.044715
    s = torch.sigmoid(z * (a + b * z * z))
    value, slope = z * s, s + z * s * (1 - s) * (a + 3 * b * z * z)
    return value.to(x.dtype), slope.to(x.dtype)
