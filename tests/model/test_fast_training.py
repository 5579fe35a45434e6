"""What training computes in its own fast ways is what the plain formulas give."""

import pytest
import torch
from torch.nn import functional as F

from lora_gpt2.memory import LiveBytes
from lora_gpt2.model.attention import causal_attention
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.products import Prepacked
from tests.conftest import needs_compiler
from tests.model.small import IDS, LABELS, MASK, VARIANTS, build, fast, furthest, gradients, plain


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
