"""Label-smoothed cross-entropy and the three accuracies.

N positions, C width, V vocabulary, B rows, T tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_gpt2.model.products import Prepacked, linear

_SMOOTHING_FROM = 1e-4
"""Below this much smoothing the published implementation takes plain cross-entropy."""

_LOGITS = 16_000_000
"""Logits that `head_loss` makes at one time: 64 MB in float32."""

_ROWS = 16
"""Rows of logits that become losses at one time on a CPU, in float32: few enough for its cache."""


def token_loss(logits: Tensor, labels: Tensor, label_smooth: float = 0.0) -> Tensor:
    """(1 - e) * -log p(label) + e * mean over the vocabulary of -log p: (N, V), (N,) -> (N,) in float32."""
    smooth = label_smooth if label_smooth > _SMOOTHING_FROM else 0.0
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smooth)


def batch_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * losses) / (sum(weights) + 1e-4), the published implementation's mean."""
    return (losses * weights).sum() / total_weight(weights)


def total_weight(weights: Tensor) -> Tensor:
    """What a batch's sum is divided by: never zero, as the published implementation has it."""
    return weights.sum(dtype=torch.float32) + 1e-4


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    label_smooth: float,
    prepacked: Prepacked | None = None,
) -> Tensor:
    """`batch_loss` of a linear head's `token_loss`, without ever holding all logits.

    `hidden` (N, C), `head` (V, C), perhaps `prepacked`, `targets` and `weights` (N,) -> scalar, float32.
    The logits of a few rows are made, turned into their losses and slopes, and forgotten: memory does not
    grow with N x V. What remains for the backward pass is one (N, C) gradient, and one of the head where it
    trains.
    """
    smooth = label_smooth if label_smooth > _SMOOTHING_FROM else 0.0
    total: Tensor = _HeadLoss.apply(hidden, head, targets, weights, smooth, prepacked)  # type: ignore[no-untyped-call]
    return total / total_weight(weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        smooth: float,
        prepacked: Prepacked | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        back, head_back, *_ = ctx.needs_input_grad
        grad = torch.empty_like(hidden) if back else None
        head_grad = torch.zeros_like(head) if head_back else None
        step = max(1, _LOGITS // len(head))
        for first in range(0, len(targets), step):
            rows = slice(first, first + step)
            h, weight = hidden[rows], weights[rows, None]
            logits = linear(h, head) if prepacked is None else prepacked.linear(h)  # (n, V)
            slopes = logits if back or head_back else None
            total += (_losses(logits, targets[rows], smooth, slopes) * weights[rows]).sum()
            if grad is not None:
                grad[rows] = (
                    linear(logits, head.T) if prepacked is None else prepacked.back(logits)
                ) * weight
            if head_grad is not None:
                head_grad += linear(logits.T, (h * weight).to(logits.dtype).T)
        ctx.save_for_backward(grad, head_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad if grad is None else grad * upstream[0] for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _losses(logits: Tensor, targets: Tensor, smooth: float, slopes: Tensor | None) -> Tensor:
    """(n,) losses of (n, V) logits; their slopes by the logits go to `slopes`, which may be the logits."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    step = _ROWS if logits.is_cpu else max(1, len(logits))
    for first in range(0, len(logits), step):
        rows = slice(first, first + step)
        target, values = targets[rows, None], logits[rows].float()
        p = values.softmax(dim=-1)
        log_sum = values.amax(dim=1) - p.amax(dim=1).log()  # one exponential a logit, for value and slope
        losses[rows] = log_sum - (1 - smooth) * values.gather(1, target).squeeze(1)
        if smooth:
            losses[rows] -= smooth * values.mean(dim=1)
        if slopes is not None:
            if smooth:
                p -= smooth / p.size(1)
            slopes[rows] = p.scatter_add_(1, target, p.new_full((), smooth - 1).expand_as(target))
    return losses


class Accuracy(NamedTuple):
    first: Tensor
    """(B,) 1 where the first completion token is the argmax."""
    all: Tensor
    """(B,) 1 where every completion token is."""


def row_accuracy(hits: Tensor, mask: Tensor) -> Accuracy:
    """`hits` and `mask` (B, T), true where the argmax is the label and where a completion token stands.

    A row without completion tokens has first = 0 and all = 1.
    """
    mask = mask.bool()
    before = mask.cumsum(dim=1)
    first = (hits.bool() & mask & (before == 1)).any(dim=1)
    return Accuracy(first.float(), (hits.bool() | ~mask).all(dim=1).float())


class CompletionReport(NamedTuple):
    """How well a batch of completions is predicted; sums, so that batches and ranks add up."""

    loss_sum: Tensor
    """Scalar: cross-entropy summed over the target tokens, in nats."""
    hit_sum: Tensor
    """Scalar: target tokens that are the argmax."""
    tokens: Tensor
    """Scalar: target tokens."""
    accuracy: Accuracy


def completion_report(logits: Tensor, labels: Tensor, mask: Tensor) -> CompletionReport:
    """`logits` (N, V) at the N positions where `mask` (B, T) is true; `labels` (B, T)."""
    targets = labels[mask]
    hit = logits.argmax(dim=-1) == targets
    hits = torch.zeros_like(mask).masked_scatter(mask, hit)
    return CompletionReport(
        loss_sum=token_loss(logits, targets).sum(),
        hit_sum=hit.sum(),
        tokens=mask.sum(),
        accuracy=row_accuracy(hits, mask),
    )
