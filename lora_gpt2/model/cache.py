"""What attention reads: keys and values seen already, one per row or shared by beams, or rows in one line.

B rows, H heads, T new tokens, S cached tokens, D head size.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, groupby, starmap
from operator import mul
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_gpt2.model.attention import RowGroup, attend, causal_attention, fused_is_faster, plain_attention


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


class PackedRows:
    """No memory: several rows lie one behind another, and each reads itself alone."""

    def __init__(self, position_ids: Tensor) -> None:
        """`position_ids` (B, T) start again at 0 with each row."""
        row = (position_ids == 0).cumsum(dim=1)
        tokens = torch.arange(row.size(1), device=row.device)
        self.seen = ((row[:, :, None] == row[:, None]) & (tokens[:, None] >= tokens))[:, None]  # (B, 1, T, T)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        if fused_is_faster(q, q.size(2)):
            return F.scaled_dot_product_attention(q, k, v, self.seen, dropout_p=p)
        return attend(q, k, v, self.seen, p)


_LIKE, _WIDTHS = 0.6, 16
"""Attention takes rows from this share of a longer one's tokens with it, padded to a multiple of that."""


class FlatRows:
    """No memory: rows lie one behind another in a single line of N tokens, without padding."""

    def __init__(self, lengths: Sequence[int], like: Tensor) -> None:
        """`lengths` of the rows, best the longest first; `like` is where, and of the type, that is read."""
        self.lengths, self._like = list(lengths), like

    @cached_property
    def _groups(self) -> tuple[list[RowGroup], Tensor]:
        """The rows as attention takes them, and where the tokens of the line stand in them."""
        members: list[list[int]] = []
        for row, length in enumerate(self.lengths):
            longest = self.lengths[members[-1][0]] if members else 0
            if not _LIKE * longest <= length <= longest:
                members.append([])
            members[-1].append(row)
        starts = list(accumulate(self.lengths, initial=0))
        groups, back, before = [], [], 0
        for rows in members:
            steps = torch.arange(-(-self.lengths[rows[0]] // _WIDTHS) * _WIDTHS)
            first, size = (torch.tensor([of[row] for row in rows])[:, None] for of in (starts, self.lengths))
            real = steps < size  # (B, T)
            places = (first + steps.minimum(size - 1)).flatten().to(self._like.device)
            groups.append(RowGroup((len(rows), len(steps)), places, real[:, None, :, None].to(self._like)))
            back.append(before + real.flatten().nonzero().squeeze(1))
            before += real.numel()
        return groups, torch.cat(back).to(self._like.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        """(1, H, N, D) each, and the result too."""
        if p == 0 and q.requires_grad and not fused_is_faster(q, max(self.lengths)):
            one_q, one_k, one_v = (x[0].transpose(0, 1) for x in (q, k, v))
            return plain_attention(one_q, one_k, one_v, *self._groups).transpose(0, 1)[None]
        shapes = [(len(list(same)), length) for length, same in groupby(self.lengths)]
        found = []
        each = (torch.split(x[0], list(starmap(mul, shapes)), dim=1) for x in (q, k, v))
        for shape, *rows in zip(shapes, *each, strict=True):
            one_q, one_k, one_v = (x.unflatten(1, shape).transpose(0, 1) for x in rows)  # (B, H, T, D)
            found.append(causal_attention(one_q, one_k, one_v, p).transpose(0, 1).flatten(1, 2))
        return torch.cat(found, dim=1)[None]


_STEP = 32
"""Slots that are added or given up at a time."""


class BeamTree:
    """Keys and values of contexts and of the tokens that the beams of each descend from.

    P places, one query in each; K beams; S slots of a place, each the keys and values of one token. All
    beams of a query read the same row of slots, each those it descends from: the context's, once, and its
    own tokens'. A slot that no beam descends from any more is given to the next token. So nothing is ever
    moved, and memory grows with what is alive. ``layers`` are the caches of the model's attention layers.
    """

    def __init__(self, layers: int, places: int, beams: int, like: Tensor) -> None:
        """`like` (2, B, H, T, D): any keys and values, for their sizes, type and device."""
        self.sees = torch.zeros(places, beams, 0, dtype=torch.bool, device=like.device)  # (P, K, S)
        self.layers = [BeamLayer(places, like) for _ in range(layers)]

    def admit(self, places: Tensor, lengths: Tensor, presents: Sequence[Tensor]) -> None:
        """Contexts of `lengths` (N,) take `places` (N,); `presents`: each layer's (2, N, H, T, D)."""
        size = presents[0].size(3)
        self._resize(max(size, self.sees.size(2)))
        slots = torch.arange(self.sees.size(2), device=lengths.device)
        self.sees[places] = (slots < lengths[:, None])[:, None]
        for layer, present in zip(self.layers, presents, strict=True):
            layer.table[:, places, :, :size] = present
            layer.table[:, places, :, size:] = 0  # NaN of an earlier query would outlast a weight of 0

    def advance(self, parents: Tensor, alive: Tensor, computed: Tensor) -> None:
        """Beam k goes on from beam parents[:, k] (P, K) if it is `alive`; those `computed` get a slot.

        A beam that is computed and not alive sees its own token alone.
        """
        self.sees = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.size(2)))
        self.sees &= alive[..., None]
        taken, beams = self.sees.any(dim=1), parents.size(1)  # (P, S)
        last = taken.any(dim=0).nonzero().amax() + 1
        self._resize(int(last.maximum(taken.sum(dim=1).amax() + beams)))
        free = ~self.sees.any(dim=1)
        slots = free.sort(dim=1, descending=True, stable=True).indices[:, :beams]  # (P, K)
        self.sees.scatter_(2, slots[..., None], computed[..., None])
        unseen = ~self.sees[:, None]  # (P, 1, K, S)
        mask = self.layers[0].table.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        rows = computed.flatten().nonzero().squeeze(1)
        heads = self.layers[0].table.size(2)
        first = (rows // beams * heads)[:, None] + torch.arange(heads, device=rows.device)  # (N, H)
        written = (first * self.sees.size(2) + slots.flatten()[rows, None]).flatten()
        for layer in self.layers:
            layer.written, layer.mask, layer.computed = written, mask, rows

    def keep(self, places: Tensor) -> None:
        """Only `places` (P',) stay, in this order."""
        self.sees = self.sees[places]
        for layer in self.layers:
            layer.keep(places)

    def _resize(self, slots: int) -> None:
        """Makes room for `slots` in each place. All are computed with, so that few are to spare."""
        more = -(-slots // _STEP) * _STEP - self.sees.size(2)
        if more > 0 or more < -_STEP:
            self.sees = F.pad(self.sees, (0, more))
            for layer in self.layers:
                layer.resize(self.sees.size(2))


class BeamLayer:
    """One layer's keys and values in a `BeamTree`."""

    def __init__(self, places: int, like: Tensor) -> None:
        self.table = like.new_zeros(2, places, like.size(2), 0, like.size(4))  # (2, P, H, S, D)
        self._memory = self.table.flatten()
        self.written = self.mask = self.computed = torch.empty(0)

    def resize(self, slots: int) -> None:
        """Room for `slots`; of fewer than before the memory is kept for later."""
        self._lay(self.table[..., :slots, :].clone(), slots)

    def keep(self, places: Tensor) -> None:
        """Only `places` (P',) stay, in this order."""
        self._lay(self.table[:, places], self.table.size(3))

    def _lay(self, kept: Tensor, slots: int) -> None:
        """The table holds `kept` (2, P, H, S, D) and zeros behind it, in the same memory where that suffices.

        Tables of ever new sizes would leave pieces of memory between them that nothing fits into.
        """
        *outer, given, width = kept.shape
        size = math.prod(outer) * slots * width
        if size > self._memory.numel():
            self._memory = kept.new_empty(max(size, 2 * self._memory.numel()))
        self.table = self._memory[:size].view(*outer, slots, width)
        self.table[..., :given, :] = kept
        self.table[..., given:, :] = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
        """One token for each of the N beams that are computed: (N, H, 1, D) each, and the result too."""
        assert p == 0, "beams are decoded in eval mode"
        (_, places, heads, slots, width), beams = self.table.shape, self.mask.size(2)
        for table, new in zip(self.table, (k, v), strict=True):
            table.view(-1, width).index_copy_(0, self.written, new.reshape(-1, width))
        asked = q.new_empty(places * beams, heads, width)  # nothing reads what other beams ask
        asked.index_copy_(0, self.computed, q.squeeze(2) * width**-0.5)
        asked = asked.view(places, beams, heads, width).transpose(1, 2).reshape(-1, beams, width)
        keys, values = self.table.flatten(1, 2)  # (P * H, S, D) each
        weights = (asked @ keys.transpose(1, 2)).view(places, heads, beams, slots).add_(self.mask)
        out = weights.softmax(dim=-1).flatten(0, 1) @ values  # (P * H, K, D)
        out = out.view(places, heads, beams, width).transpose(1, 2).reshape(-1, heads, width)
        return out.index_select(0, self.computed)[:, :, None]
