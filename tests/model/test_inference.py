"""The model laid out for decoding computes what the model computes."""

import os
import subprocess
import sys

import pytest
import torch

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.inference import Int8Linear, PackedLinear, prepare_for_decoding
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.settings import Precision

IDS = torch.randint(0, 29, (3, 11), generator=torch.Generator().manual_seed(0))


def build(**options) -> GPT2LMModel:
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(29, 64, 64, 32, 2, 4, initializer_range=0.2, lora_attn_dim=2, **options))
    for layer in model.lora_layers():
        torch.nn.init.normal_(layer.lora_B, std=0.002)
    return model.eval()


@torch.no_grad()
def logits(model: GPT2LMModel) -> torch.Tensor:
    return model(IDS)[0].float()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"vocab_multiple": 64}])
@pytest.mark.parametrize(("precision", "close"), [("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.05)])
def test_logits_stay(options, precision, close):
    expected = logits(build(**options))
    model = build(**options)
    model.merge()
    prepare_for_decoding(model, Precision(precision))
    kind = Int8Linear if precision == "int8" else PackedLinear
    assert isinstance(model.transformer.h[0].attn.c_attn, kind)
    assert logits(model).shape == expected.shape
    assert float((logits(model) - expected).abs().max()) < close * float(expected.abs().max())


def test_a_model_whose_update_is_not_merged_keeps_it():
    model = build()
    expected = logits(model)
    prepare_for_decoding(model, Precision.float32)
    assert torch.equal(logits(model), expected)


def test_outputs_stay():
    model = build()
    contexts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    settings = DecodingSettings(beam_size=3, eval_len=20)
    expected = [found[0].tokens for found in decode(model, contexts, settings, [0])]
    model.merge()
    prepare_for_decoding(model, Precision.float32)
    assert [found[0].tokens for found in decode(model, contexts, settings, [0])] == expected


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48)])
def test_products_of_8_bit_integers(activation, bias):
    """Each row by itself: within the rounding of both factors, and the same whatever stands beside it."""
    numbers = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 33, generator=numbers), torch.randn(2, 7, 33, generator=numbers)
    x[0, 0], x[0, 1], weight[3] = 0, x[0, 1] * 1e4, 0
    layer = Int8Linear(weight, bias, activation)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    dx, dw = x.abs().amax(-1, keepdim=True) / 254, weight.abs().amax(1) / 254  # half a step of each
    bound = x.abs().sum(-1, keepdim=True) * dw + dx * (weight.abs().sum(1) + 33 * dw)
    exact = exact if bias is None else exact + bias
    exact = torch.nn.functional.gelu(exact, approximate="tanh") if activation == "gelu" else exact
    assert bool(((layer(x) - exact).abs() <= 1.2 * bound + 1e-6).all())  # GELU's slope is below 1.2
    torch.testing.assert_close(
        layer(x)[1, 2:3], layer(x[1, 2:3]), rtol=1e-6, atol=1e-6
    )  # one kernel or another


def test_8_bit_integers_are_refused_where_they_cannot_be_had():
    with pytest.raises(UserError, match="one adapter at a time"):
        prepare_for_decoding(build(), Precision.int8)


@pytest.mark.parametrize("processor", ["AVX2", "AVX512_CORE"])
def test_processors_without_products_of_short_types(processor):
    """Without VNNI sums of 8-bit products could overflow; without AVX-512 there are no blocks of bfloat16."""
    tests = [f"{__file__}::test_logits_stay", f"{__file__}::test_no_sum_overflows"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not bfloat16", *tests]
    run = {"env": {**os.environ, "ONEDNN_MAX_CPU_ISA": processor}, "capture_output": True, "text": True}
    assert " passed" in (done := subprocess.run(command, **run, check=False)).stdout, done.stdout
    assert done.returncode == 0, done.stdout
    code = "from tests.model import test_inference as t; t.decode_in_bfloat16()"
    subprocess.run([sys.executable, "-c", code], **run, check=True)


def test_no_sum_overflows():
    """The worst case: everything as large as it can be, with one sign."""
    layer = Int8Linear(torch.ones(48, 64), None)
    torch.testing.assert_close(layer(torch.ones(3, 64)), torch.full((3, 48), 64.0))


def decode_in_bfloat16() -> None:
    model = build()
    model.merge()
    prepare_for_decoding(prepare_for_decoding(model, Precision.bfloat16), Precision.bfloat16)
    assert len(decode(model, [[1, 2], [3]], DecodingSettings(beam_size=2, eval_len=5), [0])) == 2


def test_a_model_is_laid_out_once():
    decode_in_bfloat16()
