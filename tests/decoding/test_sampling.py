"""Samples: of the distribution that was asked for, the same for one seed, whatever else is decoded."""

import math

import pytest
import torch

from lora_gpt2.decoding.choices import drawn
from lora_gpt2.decoding.config import DecodingSettings, Dialect, Strategy
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel

VOCAB = 13
CONTEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [2, 2], [11]]


@pytest.fixture(scope="module")
def model() -> GPT2LMModel:
    torch.manual_seed(0)
    return GPT2LMModel(GPT2Config(VOCAB, 48, 48, 16, 2, 2, initializer_range=0.5)).eval()


def sampling(**more) -> DecodingSettings:
    return DecodingSettings(
        **{"strategy": Strategy.sample, "beam_size": 4, "n_best": 4, "eval_len": 12, **more}
    )


def expected(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution, token by token."""
    probabilities = (logits.double() / temperature).softmax(0)
    order = sorted(range(len(logits)), key=lambda token: -float(probabilities[token]))
    order = order[: top_k or None]
    kept, before = [], 0.0
    total = float(sum(probabilities[token] for token in order))
    for token in order:
        if before < top_p:
            kept.append(token)
        before += float(probabilities[token]) / total
    out = torch.zeros_like(probabilities)
    out[kept] = probabilities[kept] / probabilities[kept].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 0, 1), (1.5, 4, 1), (1, 0, 0.6), (1, 5, 0.8)]
)
def test_tokens_come_as_often_as_their_probabilities_say(temperature, top_k, top_p):
    logits = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    settings = sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    chances = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(2))
    log_probs, tokens = drawn(logits[None], chances, settings)
    shares = tokens[0].bincount(minlength=VOCAB) / tokens.numel()
    wanted = expected(logits, temperature, top_k, top_p)
    torch.testing.assert_close(shares.double(), wanted, atol=0.006, rtol=0)
    assert (shares[wanted == 0] == 0).all()
    torch.testing.assert_close(log_probs[0], logits.log_softmax(0)[tokens[0]])


def test_the_seed_decides_and_neither_batch_nor_neighbours(model):
    one, other = (decode(model, CONTEXTS, sampling(batch_size=size), [12]) for size in (1, 3))
    assert [[h.tokens for h in found] for found in one] == [[h.tokens for h in found] for found in other]
    again = decode(model, CONTEXTS, sampling(seed=7), [12])
    assert [h.tokens for h in again[0]] != [h.tokens for h in one[0]]
    assert len({tuple(h.tokens) for h in one[0]}) > 1


@pytest.mark.parametrize("size", [3, 8])
def test_samples_keep_their_own_history_as_queries_come_and_go(model, size):
    """The log-probabilities are those of the tokens before, whatever was decoded beside them."""
    contexts, settings = CONTEXTS * 4, sampling(eval_len=30, batch_size=size, no_repeat_ngram_size=0)
    for context, found in zip(contexts, decode(model, contexts, settings, [12, 3]), strict=True):
        for hypothesis in found:
            with torch.no_grad():
                logits = model(torch.tensor([[*context, *hypothesis.tokens]]))[0][0]
            log_probs = logits[len(context) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(1, torch.tensor(hypothesis.tokens)[:, None])[:, 0]
            assert hypothesis.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_samples_keep_the_rules(model):
    settings = sampling(no_repeat_ngram_size=2, min_length=5, top_k=3)
    for found in decode(model, CONTEXTS, settings, [12]):
        for hypothesis in found:
            pairs = list(zip(hypothesis.tokens, hypothesis.tokens[1:], strict=False))
            assert len(pairs) == len(set(pairs))
            assert len(hypothesis.tokens) > 5 or 12 not in hypothesis.tokens
            assert 12 not in hypothesis.tokens[:-1]


def test_the_best_of_the_samples_come_first(model):
    found = decode(model, CONTEXTS, sampling(n_best=2), [12])
    everything = decode(model, CONTEXTS, sampling(), [12])
    for few, all_of_them in zip(found, everything, strict=True):
        scores = [h.score for h in all_of_them]
        assert scores == sorted(scores, reverse=True)
        assert few == all_of_them[:2]


def test_a_temperature_near_zero_is_greedy(model):
    sampled = decode(model, CONTEXTS, sampling(beam_size=1, n_best=1, temperature=1e-4), [12])
    greedy = decode(model, CONTEXTS, DecodingSettings(beam_size=1, eval_len=12), [12])
    assert [found[0].tokens for found in sampled] == [found[0].tokens for found in greedy]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be at most 1"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"n_best": 5}, "n_best 5 is more than decoding.beam_size 4"),
        ({"beam_groups": 3}, "not divisible by decoding.beam_groups 3"),
        ({"beam_groups": 2}, "beam_groups needs decoding.strategy=beam"),
        ({"dialect": Dialect.hf}, "is a beam search"),
        ({"temperature": math.nan}, "temperature must be above 0 and finite"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be above 0 and finite"),
        ({"length_penalty": 500}, "length_penalty must be from -10 to 10"),
        ({"length_penalty": math.nan}, "length_penalty must be from -10 to 10"),
        ({"diversity_penalty": math.inf}, "diversity_penalty must be finite"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling(**arguments)
