"""A batch as a CPU trains on it: without padding between rows, and in parts where it is large.

Its rows lie one behind another in a single line, so that products, norms and activations meet no padding and
rows need not be sorted by length into batches. Each part of a large batch is differentiated before the next
is computed: the same loss and the same gradients, as fast, in the memory of a part.
B rows, T tokens, N tokens of a line.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_gpt2.model.cache import FlatRows
from lora_gpt2.model.language_model import GPT2LMModel, Targets
from lora_gpt2.model.loss import total_weight

Rows = tuple[Tensor, ...]
"""Input ids, labels and mask, each (B, T); position ids too where rows are packed."""

_HIDDEN_BYTES = 3 * 2**19
"""A part's hidden states have about so many: 1,024 tokens of gpt2.sm in bfloat16, 512 in float32."""

_MULTIPLE = 16
"""A line is padded to a multiple of so many tokens: every new shape costs a library time."""


class Line(NamedTuple):
    """Rows one behind another, the longest first, each cut behind its last target."""

    ids: Tensor
    """(1, N)"""
    positions: Tensor
    """(1, N), starting again at 0 with each row."""
    targets: Targets
    lengths: list[int]
    """Of the rows; the last one's holds what the line is padded with."""

    def loss(self, model: GPT2LMModel, label_smooth: float) -> Tensor:
        rows = FlatRows(self.lengths, model.transformer.wte.weight)
        return model.loss_at(self.ids, self.targets, label_smooth, self.positions, rows)


def loss_in_parts(model: GPT2LMModel, rows: Rows, label_smooth: float = 0.0) -> Tensor:
    """`GPT2LMModel.completion_loss` of `rows`; in parts, its gradient exists as soon as it does."""
    ids, labels, mask, *positions = rows
    if not ids.is_cpu:
        return model.completion_loss(ids, labels, mask, label_smooth, *positions)
    whole = total_weight(mask)

    def loss(line: Line) -> Callable[[], Tensor]:
        share = total_weight(line.targets.weights) / whole
        return lambda: line.loss(model, label_smooth) * share

    return sum_in_turn([loss(line) for line in lines(model, rows)], model.parameters())


def parts_of(model: GPT2LMModel, tokens: int) -> int:
    """In how many parts so many tokens are trained: several only for an adapter, on a CPU.

    An adapter's gradients are small enough to be added up. A sharded base has one part, as all devices
    must run in step.
    """
    table = model.transformer.wte.weight
    if table.requires_grad or not table.is_cpu or model.sharded:
        return 1
    return max(1, -(-tokens * table.size(1) * table.element_size() // _HIDDEN_BYTES))


def line_tokens(lengths: Iterable[int]) -> int:
    """How long the line of rows of these lengths is."""
    return -(-sum(lengths) // _MULTIPLE) * _MULTIPLE


def lines(model: GPT2LMModel, rows: Rows) -> list[Line]:
    """The rows in as many lines as there are parts, of about as many tokens each; elsewhere as they lie."""
    ids, labels, mask, *positions = rows
    if not ids.is_cpu:
        places = torch.arange(ids.size(1), device=ids.device).repeat(len(ids))
        return [Line(ids.reshape(1, -1), places[None], Targets.of(labels, mask), [ids.size(1)] * len(ids))]
    found = _rows_with_targets(mask, *positions)
    total, before = sum(length for _, length in found), 0
    parts: list[list[tuple[int, int]]] = [[] for _ in range(parts_of(model, total))]
    for start, length in found:
        parts[before * len(parts) // total].append((start, length))
        before += length
    flat = ids.flatten(), labels.flatten(), mask.flatten()
    return [_line(*flat, ids.size(1), part) for part in parts if part]


def _rows_with_targets(mask: Tensor, positions: Tensor | None = None) -> list[tuple[int, int]]:
    """Where in B T each row starts and how long it is up to its last target, the longest first.

    Rows without targets are left out, but for one where all are.
    """
    first = torch.zeros_like(mask, dtype=torch.bool) if positions is None else positions == 0
    first[:, 0] = True
    starts = first.flatten().nonzero().squeeze(1)
    behind = mask.flatten() * torch.arange(1, mask.numel() + 1)
    ends = torch.zeros_like(starts).scatter_reduce_(0, first.flatten().cumsum(0) - 1, behind, "amax")
    lengths, order = (ends - starts).sort(descending=True, stable=True)
    found = [row for row in zip(starts[order].tolist(), lengths.tolist(), strict=True) if row[1] > 0]
    return found or [(0, 1)]


def _line(ids: Tensor, labels: Tensor, mask: Tensor, width: int, rows: Sequence[tuple[int, int]]) -> Line:
    """Of flat ids, labels and mask, T being `width`; `rows`: start and length of each."""
    places = torch.cat([torch.arange(start, start + length) for start, length in rows])
    targets = Targets.of(labels[places], mask[places])
    lengths = [length for _, length in rows]
    spare = line_tokens(lengths) - len(places)
    lengths[-1] += spare
    positions = torch.cat([torch.arange(length).clamp_(max=width - 1) for length in lengths])
    return Line(F.pad(ids[places], (0, spare))[None], positions[None], targets, lengths)


def sum_in_turn(losses: Sequence[Callable[[], Tensor]], parameters: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, each computed and differentiated by `parameters` before the next is computed."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if len(losses) == 1 or not trained or not torch.is_grad_enabled():
        return torch.stack([loss() for loss in losses]).sum()
    total: Tensor = _SumInTurn.apply(losses, *trained)  # type: ignore[no-untyped-call]
    return total


class _SumInTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Sequence[Callable[[], Tensor]], *parameters: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        grads: list[Tensor | None] = [None] * len(parameters)
        for loss in losses:
            with torch.enable_grad():
                value = loss()
            total += value.detach()
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            grads = [
                new if old is None else old if new is None else old + new
                for old, new in zip(grads, found, strict=True)
            ]
            del value, found  # or they would live as long as the next part
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad if grad is None else grad * upstream[0] for grad in ctx.saved_tensors)
