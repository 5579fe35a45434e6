"""Beam search against its literal definition, token for token."""

import random

import pytest
import torch

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from tests.oracles.beam import literal_beam_search

VOCAB = 13


@pytest.fixture(scope="module")
def model() -> GPT2LMModel:
    """A tiny model in float64 whose logits are far apart, so that no two candidates tie."""
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(VOCAB, 48, 48, 16, 2, 2, initializer_range=0.8)).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def random_settings(rng: random.Random) -> DecodingSettings:
    return DecodingSettings(
        beam_size=rng.choice([1, 2, 3, 5, 10, VOCAB]),
        length_penalty=rng.choice([-0.7, 0.0, 0.6, 0.9, 1.0, 2.0]),
        no_repeat_ngram_size=rng.choice([0, 1, 2, 3, 4]),
        repetition_penalty=rng.choice([0.7, 1.0, 1.0, 1.5]),
        min_length=rng.choice([0, 0, 1, 4, 12]),
        eval_len=rng.choice([1, 2, 7, 12]),
    )


def logits_after(model: GPT2LMModel, context: list[int]):
    def run(history: list[int]) -> torch.Tensor:
        return model(torch.tensor([context + history]))[0][0, -1].float()

    return run


@pytest.mark.parametrize("seed", range(200))
def test_batched_search_equals_the_literal_one_for_every_option_and_batch_size(model, seed):
    rng = random.Random(seed)
    settings = random_settings(rng)
    end_tokens = rng.sample(range(VOCAB), rng.choice([1, 1, 2, 3]))
    contexts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(seed % 8 + 1)]
    found = decode(model, contexts, settings, end_tokens)
    for context, (hypothesis,) in zip(contexts, found, strict=True):
        tokens, score = literal_beam_search(logits_after(model, context), settings, end_tokens)
        assert hypothesis.tokens == tokens, (settings, end_tokens, context)
        assert hypothesis.score == pytest.approx(score, rel=1e-5, abs=1e-6)
