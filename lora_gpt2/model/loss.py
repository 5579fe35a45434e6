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
