"""Scaled dot-product attention over heads.  B rows, H heads, T queries, S keys, D head size."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    if fused_is_faster(q, q.size(2)):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    if p == 0 and q.requires_grad:
        shape = q.size(0), q.size(2)
        one_q, one_k, one_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H, D)
        read = plain_attention(one_q, one_k, one_v, [RowGroup(shape)])
        return read.view(*shape, *read.shape[1:]).transpose(1, 2)
    seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).tril()
    return attend(q, k, v, seen, p)


class RowGroup(NamedTuple):
    """Rows that attention takes at once, of a line of N tokens."""

    shape: tuple[int, int]
    """Rows, and tokens that each is padded to."""
    places: Tensor | None = None
    """(B T,) where each token lies in the line; of padding, any. None: all of it, in this order."""
    real: Tensor | None = None
    """(B, 1, T, 1) 1 for tokens and 0 for padding, which lies behind them."""

    def of(self, line: Tensor) -> Tensor:
        """(N, H, D) -> (B H, T, D)"""
        x = line if self.places is None else line.index_select(0, self.places)
        return x.view(*self.shape, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[RowGroup], back: Tensor | None = None
) -> Tensor:
    """Causal attention of rows in one line, (N, H, D) each and the result too, in few passes over memory.

    `back` (N,): where the tokens of the line stand in the groups laid one behind another.
    """
    result: Tensor = _Causal.apply(q, k, v, groups, back)  # type: ignore[no-untyped-call]
    return result


def fused_is_faster(q: Tensor, tokens: int) -> bool:
    """Whether torch's fused kernel is, for rows of so many tokens where `q` is."""
    return q.is_cuda or tokens >= _PLAIN_BELOW


class _Causal(torch.autograd.Function):
    """Scale and mask within the product."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[RowGroup], back: Tensor | None
    ) -> Tensor:
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        with torch.autocast(kind, enabled=False):
            kept, parts = [], []
            for group in groups:
                tokens = group.shape[1]
                mask = q.new_full((tokens, tokens), -torch.inf).triu_(1)
                one_q, one_k, one_v = (group.of(x) for x in (q, k, v))
                weights = torch.baddbmm(mask, one_q, one_k.mT, alpha=q.size(-1) ** -0.5).softmax(dim=-1)
                if group.real is not None:
                    weights.view(group.shape[0], -1, tokens, tokens).mul_(group.real)  # nor any gradient
                parts.append((weights @ one_v, group))
                kept.append(weights)
            ctx.save_for_backward(q, k, v, *kept)
            ctx.groups, ctx.back = groups, back
            return _in_line(parts, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        parts: tuple[list[tuple[Tensor, RowGroup]], ...] = [], [], []
        for group, weights in zip(ctx.groups, kept, strict=True):
            one_q, one_k, one_v, grad = (group.of(x) for x in (q, k, v, upstream[0]))
            slopes = torch.ops.aten._softmax_backward_data(grad @ one_v.mT, weights, -1, weights.dtype)
            slopes *= q.size(-1) ** -0.5
            for part, one in zip(parts, (slopes @ one_k, slopes.mT @ one_q, weights.mT @ grad), strict=True):
                part.append((one, group))
        return *(_in_line(part, ctx.back) for part in parts), None, None


def _in_line(parts: Sequence[tuple[Tensor, RowGroup]], back: Tensor | None) -> Tensor:
    """(B H, T, D) of each group -> (N, H, D)"""
    heads, width = len(parts[0][0]) // parts[0][1].shape[0], parts[0][0].size(-1)
    sizes = [rows * tokens for _, ((rows, tokens), *_) in parts]
    laid = parts[0][0].new_empty(sum(sizes), heads, width)
    for (x, group), place in zip(parts, torch.split(laid, sizes), strict=True):
        rows, tokens = group.shape
        place.view(rows, tokens, heads, width).copy_(x.view(rows, heads, tokens, width).transpose(1, 2))
    return laid if back is None else laid.index_select(0, back)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys where `seen`, broadcast to (B, H, T, S), is true."""
    weights = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    weights = weights.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(v.dtype)
    return dropout(weights, p, p > 0) @ v  # (B, H, T, D)
