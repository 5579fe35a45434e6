"""The loss of a linear head, in parts and as a whole."""

import pytest
import torch
from torch.nn import functional as F

from lora_gpt2.memory import LiveBytes
from lora_gpt2.model import loss
from lora_gpt2.model.loss import batch_loss, head_loss, token_loss
from tests.model.small import GENERATOR, LABELS


@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_the_heads_loss_in_parts_is_the_whole_one(monkeypatch, smooth):
    monkeypatch.setattr(loss, "_LOGITS", 5 * 29)
    monkeypatch.setattr(loss, "_ROWS", 2)
    hidden, head = torch.randn(17, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    targets, weights = torch.randint(0, 29, (17,)), torch.rand(17)
    expected = batch_loss(token_loss(hidden @ head.T, targets, smooth), weights) * 3
    theirs = torch.autograd.grad(expected, (hidden, head))
    found = head_loss(hidden, head, targets, weights, smooth) * 3
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, head)), theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(hidden, head, targets, weights, smooth) * 3, expected)


def test_a_loss_of_bfloat16_logits_is_float32():
    hidden, head = (torch.randn(n, 64, generator=GENERATOR).bfloat16() for n in (1, 300))
    expected = F.cross_entropy((hidden @ head.T).float(), LABELS[0, :1]) / (1 + 1e-4)
    assert head_loss(hidden, head, LABELS[0, :1], torch.ones(1), 0.0).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_a_head_of_bfloat16_has_its_gradient():
    hidden = torch.randn(17, 64, generator=GENERATOR).bfloat16()
    head = torch.randn(300, 64, generator=GENERATOR).bfloat16().requires_grad_()
    targets, weights = LABELS.flatten()[:17], torch.rand(17, generator=GENERATOR)
    head_loss(hidden, head, targets, weights, 0.0).backward()
    exact = head.detach().double().requires_grad_()
    losses = F.cross_entropy(hidden.double() @ exact.T, targets, reduction="none")
    ((losses * weights).sum() / (weights.sum() + 1e-4)).backward()
    assert (head.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


def test_as_little_smoothing_as_the_published_implementation_leaves_out_is_none():
    hidden, head = (torch.randn(n, 64, generator=GENERATOR) for n in (5, 300))
    targets, weights = LABELS[0, :5], torch.ones(5)
    assert torch.equal(token_loss(hidden @ head.T, targets), token_loss(hidden @ head.T, targets, 0.0))
    whole = [token_loss(hidden @ head.T, targets, smooth) for smooth in (0.0, 1e-4, 1.1e-4)]
    parts = [head_loss(hidden, head, targets, weights, smooth) for smooth in (0.0, 1e-4, 1.1e-4)]
    for none, little, some in (whole, parts):
        assert torch.equal(none, little)
        assert not torch.equal(none, some)


def test_the_heads_memory_does_not_grow_with_positions_times_vocabulary(monkeypatch):
    monkeypatch.setattr(loss, "_LOGITS", 32 * 1000)
    peaks = []
    for positions in (64, 640):
        hidden, head = torch.randn(positions, 8, requires_grad=True), torch.randn(1000, 8)
        targets, weights = torch.randint(0, 1000, (positions,)), torch.ones(positions)
        with LiveBytes() as live:
            head_loss(hidden, head, targets, weights, 0.1).backward()
        peaks.append(live.most)
    assert peaks[1] - peaks[0] < 576 * 8 * 4 * 8 < 4 * 64 * 1000  # hidden states, not logits
