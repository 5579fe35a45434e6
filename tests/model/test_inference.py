"""The model laid out for decoding computes what the model computes."""

import pytest
import torch

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.model.config import GPT2Config, Precision
from lora_gpt2.model.inference import PackedLinear, prepare_for_decoding
from lora_gpt2.model.language_model import GPT2LMModel

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
@pytest.mark.parametrize(("precision", "close"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_logits_stay(options, precision, close):
    expected = logits(build(**options))
    model = build(**options)
    model.merge()
    prepare_for_decoding(model, Precision(precision))
    assert isinstance(model.transformer.h[0].attn.c_attn, PackedLinear)
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
