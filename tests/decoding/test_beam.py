"""Beam search against its literal definition, token for token."""

import copy
import math
import random

import pytest
import torch

from lora_gpt2.decoding import decoder
from lora_gpt2.decoding.beam import Search
from lora_gpt2.decoding.config import DecodingSettings, Dialect
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
    beams = rng.choice([1, 2, 3, 4, 6, 10, VOCAB])
    return DecodingSettings(
        beam_size=beams,
        n_best=rng.choice([1, 1, beams, (beams + 1) // 2]),
        beam_groups=rng.choice([1, 1, 1, *(n for n in range(2, beams + 1) if beams % n == 0)]),
        diversity_penalty=rng.choice([0.0, 0.3, 2.0]),
        length_penalty=rng.choice([-0.7, 0.0, 0.6, 0.9, 1.0, 2.0]),
        no_repeat_ngram_size=rng.choice([0, 1, 2, 3, 4]),
        repetition_penalty=rng.choice([0.7, 1.0, 1.0, 1.5]),
        min_length=rng.choice([0, 0, 1, 4, 12]),
        eval_len=rng.choice([1, 2, 7, 12]),
        batch_size=rng.randint(1, 8),
    )


def logits_after(model: GPT2LMModel, context: list[int]):
    @torch.no_grad()
    def run(history: list[int]) -> torch.Tensor:
        return model(torch.tensor([context + history]))[0][0, -1].float()

    return run


def check(model: GPT2LMModel, seed: int) -> int:
    """Compares one random case, every context of it; returns how many contexts there were."""
    rng = random.Random(seed)
    settings = random_settings(rng)
    end_tokens = rng.sample(range(VOCAB), rng.choice([1, 1, 2, 3]))
    contexts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(seed % 8 + 1)]
    found = decode(model, contexts, settings, end_tokens)
    for context, hypotheses in zip(contexts, found, strict=True):
        expected = literal_beam_search(logits_after(model, context), settings, end_tokens)
        assert [one.tokens for one in hypotheses] == [tokens for tokens, _ in expected], (settings, context)
        for one, (_, score) in zip(hypotheses, expected, strict=True):
            assert one.score == pytest.approx(score, rel=1e-5, abs=1e-6)
            assert len(one.log_probs) == len(one.tokens)
            if one.tokens:
                total = sum(one.log_probs) / len(one.tokens) ** settings.length_penalty
                assert one.score == pytest.approx(total, rel=1e-4, abs=1e-5)
    return len(contexts)


@pytest.mark.parametrize("seed", range(200))
def test_batched_search_equals_the_literal_one_for_every_option_and_batch_size(model, seed):
    assert check(model, seed)


@pytest.mark.parametrize(("dialect", "more"), [(Dialect.reference, ""), (Dialect.hf, " allows")])
def test_more_beams_than_tokens_are_refused(model, dialect, more):
    settings = DecodingSettings(beam_size=VOCAB + 1, eval_len=2, dialect=dialect)
    what = f"^beam_size {VOCAB + 1} is larger than the vocabulary of {VOCAB}{more}$"
    with pytest.raises(ValueError, match=what):
        decode(model, [[1]], settings, [0])


@pytest.mark.parametrize("dialect", Dialect)
def test_log_probabilities_of_bfloat16_logits_are_float32(model, dialect):
    settings = DecodingSettings(beam_size=3, eval_len=4, dialect=dialect)
    ((output, *_),) = decode(copy.deepcopy(model).bfloat16(), [[1, 2]], settings, [0])
    found = torch.tensor(output.log_probs)
    assert not torch.equal(found, found.bfloat16().float())


def test_where_every_token_is_forbidden_nothing_more_is_said(model):
    """No token may come twice, and none may end before more than there are."""
    settings = DecodingSettings(beam_size=2, no_repeat_ngram_size=1, min_length=VOCAB, eval_len=VOCAB + 3)
    ((output,),) = decode(model, [[1]], settings, [0])
    assert (output.tokens, output.score) == ([], -math.inf)


@pytest.mark.slow
def test_thousands_of_cases_equal_the_literal_search(model):
    assert sum(check(model, seed) for seed in range(200, 3200)) > 10_000


@pytest.mark.parametrize("length_penalty", [-0.7, -0.1, 0.0, 0.2, 1.0])
def test_the_search_stops_early_and_no_earlier_than_it_may(model, length_penalty):
    """Against the same search that runs to the end: fewer steps, the same outputs."""
    settings = DecodingSettings(
        beam_size=4, n_best=4, eval_len=24, no_repeat_ngram_size=0, length_penalty=length_penalty
    )
    ends = list(range(6))
    contexts = [[i % VOCAB, (3 * i) % VOCAB, i // VOCAB] for i in range(VOCAB**2)]

    class Patient(Search):
        def done(self, beams):
            return beams.lengths == self.settings.eval_len

    steps = {}
    outputs = {}
    for kind in (Search, Patient):
        search = kind(settings, ends, torch.device("cpu"), 24)
        count = 0
        extend = search.extend

        def counted(beams, hidden, *others, extend=extend):
            nonlocal count
            count += len(hidden)
            return extend(beams, hidden, *others)

        search.extend = counted
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "Search", lambda *_, search=search: search)
            outputs[kind] = decode(model, contexts, settings, ends)
        steps[kind] = count
    assert outputs[Search] == outputs[Patient]
    assert steps[Search] < steps[Patient]
