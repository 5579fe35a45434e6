"""A batch in parts, each differentiated before the next is computed: the same loss and the same gradients.

On a CPU a part of some size is as fast as a whole, and memory grows with a part in place of the batch.
B rows, T tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.loss import total_weight

Rows = tuple[Tensor, ...]
"""Input ids, labels and mask, each (B, T); position ids too where rows are packed."""

_HIDDEN_BYTES = 3 * 2**19
"""A part's hidden states have at most so many: 1,024 tokens of gpt2.sm in bfloat16, 512 in float32."""

_WIDTHS = 8
"""A part's T is a multiple of this: every new shape costs a library time and memory."""


def loss_in_parts(model: GPT2LMModel, rows: Rows, label_smooth: float = 0.0) -> Tensor:
    """`GPT2LMModel.completion_loss` of `rows`, whose gradient exists as soon as it does."""
    parts = split(model, rows)
    whole = total_weight(rows[2])

    def loss(part: Rows) -> Callable[[], Tensor]:
        ids, labels, mask, *places = part
        share = total_weight(mask) / whole
        return lambda: model.completion_loss(ids, labels, mask, label_smooth, *places) * share

    return sum_in_turn([loss(part) for part in parts], model.parameters())


def rows_of_a_part(model: GPT2LMModel, rows: int, tokens: int) -> int:
    """How many rows of a batch (B, T) are trained at a time: not all, only where an adapter is on a CPU.

    The gradients of an adapter are small enough to be added up.
    """
    table = model.transformer.wte.weight
    if table.requires_grad or not table.is_cpu:
        return rows
    most = max(1, _HIDDEN_BYTES // (tokens * table.size(1) * table.element_size()))
    return -(-rows // -(-rows // most))  # as many in each part


def split(model: GPT2LMModel, rows: Rows) -> list[Rows]:
    """The longest rows first, each part cut behind its last target."""
    mask = rows[2]
    count = rows_of_a_part(model, *mask.shape)
    if count == len(mask):
        return [rows]
    lengths = (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(dim=1)
    order = lengths.sort(descending=True, stable=True).indices
    parts = []
    for members in torch.split(order, count):
        width = -(-max(1, int(lengths[members[0]])) // _WIDTHS) * _WIDTHS
        parts.append(tuple(one[members, :width] for one in rows))
    return parts


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
