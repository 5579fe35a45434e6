"""Keys and values that attention has seen already, in two shapes: one per row, or shared by beams.

B rows, H heads, T new tokens, S cached tokens, D head size; Q queries, K beams of each.
"""

from typing import Protocol

import torch
from torch import Tensor

from lora_gpt2.model.attention import attend, causal_attention


class LayerCache(Protocol):
    """One layer's memory: takes the new tokens' q, k, v (B, H, T, D), returns what attention reads.

    `p`: dropout of the attention weights, while training.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor: ...


class RowCache:
    """The published implementation's cache: `past` is (2, B, H, S, D), keys first.

    Without `len_past` new tokens are appended to `past`. With `len_past` (B,), `past` is a table of
    fixed size whose first len_past slots of each row are filled: the one new token of a row is written
    in place behind them.
    """

    def __init__(self, past: Tensor | None = None, len_past: Tensor | None = None) -> None:
        self.past, self.len_past = past, len_past
        self.present: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        if self.past is None:
            self.present = torch.stack((k, v))
            return causal_attention(q, k, v, p)
        if self.len_past is None:
            self.present = torch.cat((self.past, torch.stack((k, v))), dim=3)  # (2, B, H, S + T, D)
            new, total = k.size(2), self.present.size(3)
            seen = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)  # (T, S + T)
            return attend(q, self.present[0], self.present[1], seen, p)
        if k.size(2) != 1:
            raise ValueError(f"with len_past the input is one token a row, not {k.size(2)}")
        rows = torch.arange(k.size(0), device=k.device)
        self.past[0][rows, :, self.len_past] = k[:, :, 0]
        self.past[1][rows, :, self.len_past] = v[:, :, 0]
        self.present = self.past
        slots = torch.arange(self.past.size(3), device=q.device)
        seen = (slots <= self.len_past[:, None])[:, None, None]  # (B, 1, 1, S)
        return attend(q, self.past[0], self.past[1], seen, p)


class PrefixCache:
    """Keys and values of Q contexts, held once, and of the tokens that K beams add to each of them.

    First call (the contexts, right-padded to S): rows are queries. Later calls: one token for each beam,
    rows are queries times beams. `lengths` (Q,) are the contexts' real lengths.
    """

    def __init__(self, lengths: Tensor, new_tokens: int) -> None:
        self.lengths, self.new_tokens = lengths, new_tokens
        self.prefix: Tensor | None = None  # (2, Q, H, S, D)
        self.added = torch.empty(0)  # (2, Q, K, H, new_tokens, D)
        self.used = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        assert p == 0, "beams are decoded in eval mode"
        if self.prefix is None:
            self.prefix = torch.stack((k, v))
            return causal_attention(q, k, v)
        queries, heads, size, width = *self.prefix.shape[1:4], q.size(-1)
        beams = q.size(0) // queries
        if self.used == 0:
            self.added = k.new_zeros(2, queries, beams, heads, self.new_tokens, width)
        self.added[0, ..., self.used, :] = k.view(queries, beams, heads, width)
        self.added[1, ..., self.used, :] = v.view(queries, beams, heads, width)
        self.used += 1
        added = self.added[..., : self.used, :]

        q = q.view(queries, beams, heads, 1, width) * width**-0.5
        q_prefix = q.squeeze(3).transpose(1, 2)  # (Q, H, K, D)
        pad = torch.arange(size, device=q.device) >= self.lengths[:, None]  # (Q, S)
        on_prefix = (q_prefix @ self.prefix[0].transpose(-2, -1)).masked_fill(pad[:, None, None], -torch.inf)
        on_added = (q @ added[0].transpose(-2, -1)).squeeze(3).transpose(1, 2)  # (Q, H, K, used)
        weights = torch.cat((on_prefix, on_added), dim=-1).float().softmax(dim=-1).to(q.dtype)
        out = weights[..., :size] @ self.prefix[1]  # (Q, H, K, D)
        out = out.transpose(1, 2) + (weights[..., size:].transpose(1, 2).unsqueeze(3) @ added[1]).squeeze(3)
        return out.reshape(queries * beams, heads, 1, width)

    def reorder(self, queries: Tensor, parents: Tensor) -> None:
        """Keeps the queries (Q',) and, for each, lets beam k go on from beam parents[:, k] (Q', K)."""
        assert self.prefix is not None
        if queries.numel() != self.lengths.numel():
            self.prefix, self.lengths = self.prefix[:, queries], self.lengths[queries]
        if self.used:
            self.added[:, : queries.numel(), :, :, : self.used] = self.added[
                :, queries[:, None], parents, :, : self.used
            ]
            self.added = self.added[:, : queries.numel()]
