"""Scaled dot-product attention over heads.  B rows, H heads, T queries, S keys, D head size."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_gpt2.model.dropout import dropout

_PLAIN_BELOW = 512
"""On a CPU plain matrix products beat the fused kernel for inputs shorter than this."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
    """Each token reads itself and those before it: (B, H, T, D) for q, k, v alike; dropout of `p`.

    Right-padded rows need no mask: padding lies behind every real token.
    """
    if fused_is_faster(q):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    if p == 0 and q.requires_grad:
        result: Tensor = _Causal.apply(q, k, v)  # type: ignore[no-untyped-call]
        return result
    seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril()
    return attend(q, k, v, seen, p)


def fused_is_faster(q: Tensor) -> bool:
    """Whether torch's fused kernel is, for queries (B, H, T, D)."""
    return q.is_cuda or q.size(2) >= _PLAIN_BELOW


class _Causal(torch.autograd.Function):
    """Causal attention in few passes over memory: scale and mask within the product, nothing copied twice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, kind = q.shape, q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        q, k, v = (x.flatten(0, 1).to(dtype) for x in (q, k, v))  # (B H, T, D)
        with torch.autocast(kind, enabled=False):
            mask = q.new_full((q.size(1), q.size(1)), -torch.inf).triu_(1)
            weights = torch.baddbmm(mask, q, k.mT, alpha=q.size(-1) ** -0.5).softmax(dim=-1)
            ctx.save_for_backward(q, k, v, weights)
            return (weights @ v).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = upstream[0].flatten(0, 1)  # (B H, T, D)
        slopes = torch.ops.aten._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
        slopes *= q.size(-1) ** -0.5
        grads = slopes @ k, slopes.mT @ q, weights.mT @ grad
        return tuple(x.unflatten(0, upstream[0].shape[:2]) for x in grads)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys where `seen`, broadcast to (B, H, T, S), is true."""
    weights = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    weights = weights.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(v.dtype)
    return dropout(weights, p, p > 0) @ v  # (B, H, T, D)
