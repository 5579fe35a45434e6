"""What training computes in its own fast ways is what the plain formulas give."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_gpt2.memory import LiveBytes
from lora_gpt2.model import loss, parts
from lora_gpt2.model.attention import causal_attention
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.loss import batch_loss, head_loss, token_loss
from lora_gpt2.model.products import Prepacked
from tests.conftest import needs_compiler

GENERATOR = torch.Generator().manual_seed(1)
IDS, LABELS = (torch.randint(0, 300, (5, 23), generator=GENERATOR) for _ in range(2))
MASK = torch.rand(5, 23, generator=GENERATOR) < 0.5


def build(**options) -> GPT2LMModel:
    torch.manual_seed(0)
    config = GPT2Config(
        300,
        64,
        64,
        64,
        2,
        4,
        **{"initializer_range": 0.1, "lora_attn_dim": 4, "lora_attn_alpha": 32, **options},
    )
    model = GPT2LMModel(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "lora_bias")):
            torch.nn.init.normal_(parameter, std=0.05)
    model.train_only_lora()
    return model


def gradients(model: GPT2LMModel, value: Tensor) -> dict[str, Tensor]:
    value.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: GPT2LMModel) -> tuple[float, dict[str, Tensor]]:
    """All logits in float64, attention by torch, one formula."""
    model = model.double()
    logits = model.lm_head(model.transformer.hidden_states(IDS))
    losses = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="none", label_smoothing=0.1)
    value = losses[MASK.flatten()].sum() / (MASK.sum() + 1e-4)
    return value.item(), gradients(model, value)


def fast(model: GPT2LMModel) -> tuple[float, dict[str, Tensor]]:
    value = model.completion_loss(IDS, LABELS, MASK, 0.1)
    return value.item(), gradients(model, value)


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


VARIANTS = [
    {},
    {"bias": False},
    {"vocab_multiple": 64},
    {"lora_bias": "all"},
    {"lora_dora": True},
    {"lora_init": "pissa"},
    {"lora_targets": ["c_attn", "c_proj", "mlp_c_fc", "mlp_c_proj"], "lora_rslora": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradients_are_those_of_the_plain_formulas(options):
    value, expected = plain(build(**options))
    found, grads = fast(build(**options))
    assert found == pytest.approx(value, abs=2e-6)
    assert furthest(grads, expected) < 2e-5


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_bfloat16_base_is_the_same_to_its_rounding(options):
    value, expected = plain(build(**options))
    model = build(**options)
    model.train_only_lora(torch.bfloat16)
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert all((kind is torch.float32) == ("lora_" in name) for name, kind in types.items())
    model.prepack()
    assert (model.lm_head.prepacked is not None) == Prepacked.fits(torch.zeros(2, 2, dtype=torch.bfloat16))
    found, grads = fast(model)
    assert found == pytest.approx(value, rel=2e-3)
    assert furthest(grads, expected) < 0.05


def test_packing_changes_no_result_and_is_undone():
    model, other = build(), build()
    for one in (model, other):
        one.train_only_lora(torch.bfloat16)
    before = {name: value.clone() for name, value in model.weights().items()}
    model.prepack()
    model.prepack()
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.weight.shape, layer.weight.requires_grad) == ((64, 192), False)
    assert layer.prepacked is None or layer.weight.isnan().all()
    value, grads = fast(model)
    expected, theirs = fast(other)
    assert value == pytest.approx(expected, rel=1e-3)
    assert furthest(grads, theirs) < 0.02
    if model.lm_head.prepacked is not None:
        with pytest.raises(AssertionError, match="unpack"):
            model.merge()
    model.unpack()
    assert not layer.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items())


@needs_compiler
def test_compiled_is_the_same():
    value, expected = plain(build())
    model = build()
    model.compile_blocks()
    found, grads = fast(model)
    assert found == pytest.approx(value, abs=2e-6)
    assert furthest(grads, expected) < 2e-5


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


def test_as_little_smoothing_as_the_published_implementation_leaves_out_is_none():
    hidden, head = (torch.randn(n, 64, generator=GENERATOR) for n in (5, 300))
    targets, weights = LABELS[0, :5], torch.ones(5)
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


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_attention_and_its_gradients_are_torchs(tokens):
    found, expected = [], []
    for function, results in (
        (causal_attention, found),
        (lambda *heads: F.scaled_dot_product_attention(*heads, is_causal=True), expected),
    ):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, tokens, 3, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        y = function(*x.permute(2, 0, 3, 1, 4))
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        results += [y, x.grad]
    torch.testing.assert_close(found, expected)


def test_hidden_states_can_be_had_at_some_positions_alone():
    model = build().double()
    positions = MASK.flatten().nonzero().squeeze(1)
    found = model.transformer.hidden_states(IDS, kept=positions)
    torch.testing.assert_close(found, model.transformer.hidden_states(IDS).flatten(0, 1)[positions])


@pytest.mark.parametrize("options", [{}, {"lora_targets": ["mlp_c_proj"]}], ids=str)
def test_gradient_checkpointing_reaches_every_matrix_of_a_frozen_base(options):
    value, expected = fast(build(**options))
    model = build(**options)
    model.transformer.gradient_checkpointing = True
    found, grads = fast(model)
    assert found == value
    assert furthest(grads, expected) < 1e-6


def test_gradient_checkpointing_saves_memory():
    peaks = []
    for checkpointing in (False, True):
        model = GPT2LMModel(GPT2Config(300, 64, 64, 64, 8, 4, lora_attn_dim=4)).train()
        model.train_only_lora()
        model.transformer.gradient_checkpointing = checkpointing
        with LiveBytes() as live:
            model.completion_loss(IDS, LABELS, MASK).backward()
        peaks.append(live.most)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_autocast_is_the_same_to_its_rounding(options):
    value, expected = plain(build(**options))
    model = build(**options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.completion_loss(IDS, LABELS, MASK, 0.1)
    assert loss.item() == pytest.approx(value, rel=5e-3)
    assert furthest(gradients(model, loss), expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_targets_costs_nothing_and_breaks_nothing(dtype):
    model = build()
    model.train_only_lora(dtype)
    model.prepack()
    report = model.completion_report(IDS, LABELS, torch.zeros_like(MASK))
    assert (report.loss_sum, report.tokens) == (0, 0)
    value = model.completion_loss(IDS, LABELS, torch.zeros_like(MASK), 0.1)
    value.backward()
    assert value.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


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
