import math

import pytest
import torch

from lora_gpt2.model.loss import completion_report
from lora_gpt2.training.accuracy import StageMetrics


def batch(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits over 5 ids, labels and a mask whose rows have 0 to `length` targets at their ends."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) >= starts
    labels = torch.randint(0, 5, (rows, length), generator=generator)
    return torch.randn(rows, length, 5, generator=generator) * 2, labels, mask


def test_batches_add_up_to_the_literal_values():
    metrics, losses, hits, first, every = StageMetrics(), [], [], [], []
    for seed, (rows, length) in enumerate([(4, 6), (1, 3), (9, 8)]):
        logits, labels, mask = batch(rows, length, seed)
        metrics.update(completion_report(logits[mask], labels, mask))
        for row in range(rows):
            row_hits = []
            for t in range(length):
                if mask[row, t]:
                    losses.append(-float(logits[row, t].log_softmax(0)[labels[row, t]]))
                    row_hits.append(int(logits[row, t].argmax()) == int(labels[row, t]))
            hits += row_hits
            first.append(bool(row_hits and row_hits[0]))
            every.append(all(row_hits))
    got = {name: float(value) for name, value in metrics.compute().items()}
    loss = sum(losses) / len(losses)
    expected = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": sum(hits) / len(hits),
                "first_token_accuracy": sum(first) / len(first),
                "all_token_accuracy": sum(every) / len(every)}  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_targets_changes_nothing_and_reset_forgets():
    metrics = StageMetrics()
    logits, labels, mask = batch(3, 4, 0)
    metrics.update(completion_report(logits[mask], labels, mask))
    before = metrics.compute()
    nothing = torch.zeros_like(mask)
    metrics.update(completion_report(logits[nothing], labels, nothing))
    assert metrics.compute() == before
    metrics.reset()
    logits, labels, mask = batch(3, 4, 1)
    metrics.update(completion_report(logits[mask], labels, mask))
    assert metrics.compute()["loss"] != before["loss"]


def test_after_a_reset_only_what_follows_counts():
    logits, labels, mask = batch(9, 8, 2)
    used, fresh = StageMetrics(), StageMetrics()
    other = batch(4, 6, 0)
    used.update(completion_report(other[0][other[2]], other[1], other[2]))
    used.reset()
    for metrics in (used, fresh):
        metrics.update(completion_report(logits[mask], labels, mask))
    assert used.compute() == fresh.compute()
