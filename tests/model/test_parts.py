"""A batch that trains in parts gives what it gives as a whole."""

import pytest
import torch

from lora_gpt2.memory import LiveBytes
from lora_gpt2.model import parts
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from tests.model.small import GENERATOR, IDS, LABELS, MASK, VARIANTS, build, furthest, gradients

LENGTHS = torch.tensor([9, 23, 4, 17, 12])
UNEVEN = (torch.arange(23) >= 2) & (torch.arange(23) < LENGTHS[:, None])
"""Rows of very different lengths: 9 is the first that needs a new width."""


@pytest.mark.parametrize("options", [*VARIANTS, {"lora_bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("tokens", [23, 50, 100])
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(monkeypatch, options, tokens):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", tokens * 64 * 8)
    whole, model = build(**options).double(), build(**options).double()
    value = parts.loss_in_parts(model, (IDS, LABELS, UNEVEN), 0.1)
    expected = whole.completion_loss(IDS, LABELS, UNEVEN, 0.1)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert furthest(gradients(model, 3 * value), gradients(whole, 3 * expected)) < 1e-6


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (20, [[23 + 9], [17 + 15], [12 + 4], [9, 4 + 3]]),
        (40, [[23, 17 + 8], [12, 9, 4 + 7]]),
        (100, [[23, 17, 12, 9, 4 + 15]]),
    ],
)
def test_a_line_holds_rows_without_padding_between_them(monkeypatch, tokens, lengths):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", tokens * 64 * 4)
    found = parts.lines(build(), (IDS, LABELS, UNEVEN))
    assert [line.lengths for line in found] == lengths
    assert sum(float(line.targets.weights.sum()) for line in found) == UNEVEN.sum()
    assert all(line.ids.size(1) == line.positions.size(1) == sum(line.lengths) for line in found)


@pytest.mark.parametrize("longest", [60, 520])
def test_a_line_of_short_and_long_rows_has_the_gradients_of_padded_ones(longest):
    """From 512 tokens on attention is the fused kernel."""
    torch.manual_seed(0)
    config = GPT2Config(300, 600, 600, 32, 2, 4, lora_attn_dim=4, lora_attn_alpha=32)
    ids = torch.randint(0, 300, (6, longest), generator=GENERATOR)
    mask = torch.arange(longest) < torch.tensor([longest, 33, longest, 7, 48, 49])[:, None]
    one, other = (GPT2LMModel(config).double() for _ in range(2))
    for layer in one.lora_layers():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model.train_only_lora()
    value, expected = parts.loss_in_parts(one, (ids, ids, mask)), other.completion_loss(ids, ids, mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert furthest(gradients(one, value), gradients(other, expected)) < 1e-6


@pytest.mark.parametrize("rows", [1, 2])
def test_a_loss_in_parts_is_float32_whatever_the_default(monkeypatch, rows):
    """lightning's bf16-true makes bfloat16 the default while a step runs: it cannot count to 257."""
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", rows * 600 * 64 * 4)
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(300, 600, 600, 64, 1, 4, lora_attn_dim=4, lora_attn_alpha=32))
    model.train_only_lora()
    ids = torch.randint(0, 300, (2, 600), generator=GENERATOR)
    mask = torch.arange(600) >= 1
    expected = model.completion_loss(ids, ids, mask.expand(2, -1)).item()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = parts.loss_in_parts(model, (ids, ids, mask.expand(2, -1)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_without_gradients_a_batch_in_parts_has_its_loss(monkeypatch):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", 23 * 64 * 4)
    model = build()
    expected = model.completion_loss(IDS, LABELS, UNEVEN).item()
    with torch.no_grad():
        assert parts.loss_in_parts(model, (IDS, LABELS, UNEVEN)).item() == pytest.approx(expected, rel=1e-5)
    model.requires_grad_(False)
    assert parts.loss_in_parts(model, (IDS, LABELS, UNEVEN)).item() == pytest.approx(expected, rel=1e-5)


def test_rows_without_targets_have_a_part_too(monkeypatch):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", 64 * 4)
    nothing = torch.zeros_like(MASK)
    assert parts.loss_in_parts(build(), (IDS, LABELS, nothing)).item() == 0
    one = nothing.clone()
    one[2, 4] = True
    found = parts.loss_in_parts(build(), (IDS, LABELS, one))
    assert found.item() == pytest.approx(build().completion_loss(IDS, LABELS, one).item(), rel=1e-5)


def test_packed_lines_go_in_parts_too(monkeypatch):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", 30 * 64 * 4)
    starts = torch.tensor([3, 9, 1, 14, 6])[:, None]
    places = torch.arange(23)
    positions = torch.where(places < starts, places, places - starts)
    model, whole = build(), build()
    value = parts.loss_in_parts(model, (IDS, LABELS, UNEVEN, positions))
    expected = whole.completion_loss(IDS, LABELS, UNEVEN, position_ids=positions)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert furthest(gradients(model, value), gradients(whole, expected)) < 1e-4


def test_memory_grows_with_a_part_and_not_with_the_batch(monkeypatch):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", MASK.numel() * 64 * 4)
    most = []
    for times in (1, 8):
        model = build()
        batch = tuple(one.repeat(times, 1) for one in (IDS, LABELS, MASK))
        with LiveBytes() as live:
            parts.loss_in_parts(model, batch).backward()
        most.append(live.most)
    assert most[1] < 1.2 * most[0]


def test_a_model_that_trains_whole_is_not_split():
    model = GPT2LMModel(GPT2Config(300, 64, 64, 64, 2, 4))
    assert parts.parts_of(model, 64_000) == 1
