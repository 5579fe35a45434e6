"""Decoding with caches and merged adapters against running the whole sequence again."""

import psutil
import pytest
import torch

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import Query, decode, decode_stream, fitting_batch
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel

END = 12
CONTEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [2, 2]]


@pytest.fixture
def model() -> GPT2LMModel:
    """A model in float64 with an update that is not zero."""
    torch.manual_seed(0)
    config = GPT2Config(13, 48, 48, 16, 2, 2, initializer_range=0.8, lora_attn_dim=2, lora_attn_alpha=4)
    model = GPT2LMModel(config).double().eval()
    for layer in model.lora_layers():
        torch.nn.init.normal_(layer.lora_B)
    return model


@torch.no_grad()
def greedy(model: GPT2LMModel, context: list[int], eval_len: int) -> list[int]:
    output: list[int] = []
    while len(output) < eval_len and END not in output:
        output.append(int(model(torch.tensor([context + output]))[0][0, -1].argmax()))
    return output


@pytest.mark.parametrize("merged", [False, True])
def test_one_beam_is_greedy(model, merged):
    expected = [greedy(model, context, 20) for context in CONTEXTS]
    if merged:
        model.merge()
    settings = DecodingSettings(beam_size=1, no_repeat_ngram_size=0, eval_len=20)
    assert [found.tokens for (found,) in decode(model, CONTEXTS, settings, [END])] == expected
    assert len(set(map(tuple, expected))) > 1


@pytest.mark.parametrize("beams", [2, 5])
def test_neither_batch_nor_order_changes_an_output(model, beams):
    settings = DecodingSettings(beam_size=beams, eval_len=16)
    alone = [decode(model, [context], settings, [END])[0] for context in CONTEXTS]
    together = decode(model, CONTEXTS, settings, [END])
    reverse = decode(model, CONTEXTS[::-1], settings, [END])[::-1]
    for (one,), (two,), (three,) in zip(alone, together, reverse, strict=True):
        assert one.tokens == two.tokens == three.tokens
        assert one.score == pytest.approx(two.score, rel=1e-6) == pytest.approx(three.score, rel=1e-6)


def test_a_score_is_the_log_probability_over_the_length_to_the_penalty(model):
    settings = DecodingSettings(beam_size=3, no_repeat_ngram_size=0, length_penalty=0.7, eval_len=10)
    for context, (found,) in zip(CONTEXTS, decode(model, CONTEXTS, settings, [END]), strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([context + found.tokens]))[0][0].log_softmax(-1)
        total = sum(float(log_probs[len(context) - 1 + i, token]) for i, token in enumerate(found.tokens))
        assert found.score == pytest.approx(total / len(found.tokens) ** 0.7, rel=1e-5)


def test_an_output_beyond_the_positions_is_refused(model):
    with pytest.raises(ValueError, match="7 tokens and eval_len 42 exceed the model's 48 positions"):
        decode(model, CONTEXTS, DecodingSettings(eval_len=42), [END])


def test_a_padded_vocabulary_changes_no_beam(model):
    padded = (
        GPT2LMModel(GPT2Config.from_dict({**model.config.to_dict(), "vocab_multiple": 64})).double().eval()
    )
    padded.load_weight(model.weights())
    padded.transformer.wte.weight.data[13:] = 9.0  # would win everywhere, were they asked
    settings = DecodingSettings(beam_size=4, eval_len=16)
    assert decode(padded, CONTEXTS, settings, [END]) == decode(model, CONTEXTS, settings, [END])


def test_the_batch_is_chosen_by_beams_and_free_memory(model, monkeypatch):
    memory = psutil.virtual_memory()
    sizes = {}
    for free in (10**12, 10**6, 0):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory._replace(available=free))
        sizes[free] = [fitting_batch(model, DecodingSettings(beam_size=n, eval_len=16)) for n in (1, 10)]
    assert sizes[10**12] == [64 * 160, 64 * 16]
    assert 1 < sizes[10**6][1] < 64 * 16
    assert sizes[0] == [1, 1]


def test_queries_are_read_only_when_there_is_room(model):
    read = 0

    def queries():
        nonlocal read
        for number in range(100):
            read += 1
            yield Query(number, CONTEXTS[number % 4])

    settings = DecodingSettings(beam_size=2, eval_len=16, batch_size=4)
    found = {}
    for number, outputs in decode_stream(model, queries(), settings, [END]):
        found[number] = outputs[0].tokens
        assert read <= len(found) + 4
    assert len(found) == 100
    assert all(found[i] == found[i % 4] for i in found)
