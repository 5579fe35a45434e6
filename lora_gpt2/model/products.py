"""Matrix products by the library that is fastest where they run.

On a CPU that is oneDNN. torch asks it for bfloat16 by itself, but sends float32 to MKL, which takes up to
three times as long on processors that are not Intel's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HAS_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., in), (out, in), (out,) -> (..., out)"""
    if not HAS_ONEDNN or not all(one.is_cpu and one.dtype is torch.float32 for one in (x, weight)):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") or not x.numel() or x.size(-1) != weight.size(1):
        return F.linear(x, weight, bias)
    rows: Tensor = _OneDNN.apply(x.reshape(-1, x.size(-1)), weight, bias)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], weight.size(0))


class Prepacked:
    """A matrix W (out, in) that does not train, in oneDNN's blocks: once for x W^T, once for its gradient.

    Laid out once, it need not be at each product: in bfloat16 that saves 15 to 20 % of their time.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype
        self.blocks, self.transposed = blocks(weight), blocks(weight.T)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether it does not train, and this pays: float32 gains half as much for twice the memory."""
        if weight.requires_grad or not weight.is_cpu or weight.dtype is not torch.bfloat16 or not HAS_ONEDNN:
            return False
        supported: bool = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
        return supported

    def dense(self) -> Tensor:
        """W again, bit for bit."""
        return self.blocks.to_dense()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: (..., in) -> (..., out)"""
        rows = x.reshape(-1, x.size(-1))
        result: Tensor = _PrepackedLinear.apply(rows, self, bias)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], self.shape[0])

    def back(self, grad: Tensor) -> Tensor:
        """grad W: (N, out) -> (N, in)"""
        return product(grad.contiguous(), self.transposed)


class _OneDNN(torch.autograd.Function):
    """Of x (N, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_grad, weight_grad, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_grad else None, weight if x_grad else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = upstream[0].contiguous()  # (N, out)
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else product(grad, weight.T),
            None if x is None else product(grad.T, x.T),
            grad.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


class _PrepackedLinear(torch.autograd.Function):
    """Of x (N, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prepacked: Prepacked, bias: Tensor | None) -> Tensor:
        ctx.prepacked = prepacked
        return product(x, prepacked.blocks, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, _, bias_grad = ctx.needs_input_grad
        return (
            ctx.prepacked.back(upstream[0]) if x_grad else None,
            None,
            upstream[0].sum(dim=0) if bias_grad else None,
        )


def blocks(weight: Tensor, rows: int = 512) -> Tensor:
    """W (out, in) in the blocks that oneDNN wants for x of about so many rows."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return found


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", formula: str = ""
) -> Tensor:
    """x W^T + b by oneDNN, perhaps followed by an activation; W (out, in) may lie in `blocks`."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], formula)
    return found
