"""Label-smoothed cross-entropy and the three accuracies.  N positions, V vocabulary, B rows, T tokens."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_SMOOTHING_FROM = 1e-4
"""Below this much smoothing the published implementation takes plain cross-entropy."""


def token_loss(logits: Tensor, labels: Tensor, label_smooth: float = 0.0) -> Tensor:
    """(1 - e) * -log p(label) + e * mean over the vocabulary of -log p: (N, V), (N,) -> (N,) in float32."""
    smooth = label_smooth if label_smooth > _SMOOTHING_FROM else 0.0
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smooth)


def batch_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * losses) / (sum(weights) + 1e-4), the published implementation's mean."""
    return (losses * weights).sum() / (weights.sum() + 1e-4)


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


class CompletionLoss(NamedTuple):
    """What one pass over a batch of completions yields; sums, so that batches and ranks add up."""

    loss: Tensor
    """Scalar with gradient: label-smoothed, as `batch_loss` defines it."""
    loss_sum: Tensor
    """Scalar: sum of plain cross-entropy over the target tokens, in nats."""
    hit_sum: Tensor
    """Scalar: target tokens that are the argmax."""
    tokens: Tensor
    """Scalar: target tokens."""
    accuracy: Accuracy


def completion_loss(logits: Tensor, labels: Tensor, mask: Tensor, label_smooth: float) -> CompletionLoss:
    """`logits` (N, V) at the N positions where `mask` (B, T) is true; `labels` (B, T)."""
    mask = mask.bool()
    targets = labels[mask]
    losses = token_loss(logits, targets, label_smooth)
    with torch.no_grad():
        plain = losses.detach() if label_smooth <= _SMOOTHING_FROM else token_loss(logits.detach(), targets)
        hit = logits.argmax(dim=-1) == targets
        hits = torch.zeros_like(mask).masked_scatter(mask, hit)
    tokens = mask.sum()
    return CompletionLoss(
        loss=losses.sum() / (tokens + 1e-4),
        loss_sum=plain.sum(),
        hit_sum=hit.sum(),
        tokens=tokens,
        accuracy=row_accuracy(hits, mask),
    )
