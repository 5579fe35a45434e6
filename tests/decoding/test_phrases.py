"""Phrases that an output must contain."""

import random

import pytest
import torch

from lora_gpt2.decoding.config import DecodingSettings, Dialect, Strategy
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.decoding.phrases import Candidate, allocate, missing, said, wanted
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel

VOCAB = 40
END = 0


@pytest.fixture(scope="module")
def model() -> GPT2LMModel:
    torch.manual_seed(0)
    return GPT2LMModel(GPT2Config(VOCAB, 64, 64, 16, 2, 2, initializer_range=0.5)).eval()


def holds(tokens: list[int], phrase: list[int]) -> bool:
    return any(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens)))


@pytest.mark.parametrize(
    ("tokens", "left", "next_ones", "amount"),
    [
        ([], [[1, 2, 3], [4]], [1, 4], 0),
        ([1, 2], [[1, 2, 3], [4]], [3, 4], 2),
        ([1, 2, 4], [[1, 2, 3]], [1], 1),
        ([1, 2, 3], [[4]], [4], 3),
        ([1, 1], [[1, 2, 3], [4]], [2, 4], 1),
        ([4, 1, 2, 3], [], [], 4),
    ],
)
def test_what_is_said_and_what_is_wanted(tokens, left, next_ones, amount):
    phrases = [[1, 2, 3], [4]]
    assert missing(tokens, phrases) == left
    assert wanted(tokens, phrases) == next_ones
    assert said(tokens, phrases) == amount


def test_places_are_dealt_in_turn_to_what_has_said_more_and_less():
    likely = [Candidate(0, token, -0.1, -0.1 - token) for token in (5, 6, 7, 8)]
    phrase = [Candidate(0, 1, -9.0, -90.0), Candidate(1, 2, -9.0, -80.0)]
    kept = allocate([*likely, *phrase], [[], [1]], [[1, 2]], 4)
    assert kept == [likely[0], likely[1], phrase[1], phrase[0]]


@pytest.mark.parametrize("seed", range(30))
def test_every_phrase_is_in_the_output(model, seed):
    rng = random.Random(seed)
    contexts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(4)]
    phrases = [
        [rng.sample(range(1, VOCAB), rng.randint(1, 3)) for _ in range(rng.randint(0, 3))] for _ in contexts
    ]
    settings = DecodingSettings(
        beam_size=rng.choice([1, 4, 10]), n_best=1, no_repeat_ngram_size=0, eval_len=30, batch_size=3
    )
    found = decode(model, contexts, settings, [END], phrases)
    free = decode(model, contexts, settings, [END])
    for own, (output,), (unbound,) in zip(phrases, found, free, strict=True):
        assert all(holds(output.tokens, phrase) for phrase in own), (own, output.tokens)
        if not own:
            assert output.tokens == unbound.tokens
        total = sum(output.log_probs) / len(output.tokens) ** settings.length_penalty
        assert output.score == pytest.approx(total, rel=1e-4)


def test_where_nothing_is_pruned_the_outputs_are_the_best_that_hold_their_phrases(model):
    """As many beams as tokens, and two steps. [1, 2, 3] cannot be said: the best that do not end anyway."""
    kinds = [[[3]], [[5, 6]], [], [[7], [8]], [[1, 2, 3]], [[END]]]
    contexts = [[token] for token in range(VOCAB)]
    phrases = [kinds[token % len(kinds)] for token in range(VOCAB)]
    settings = DecodingSettings(beam_size=VOCAB, n_best=2, no_repeat_ngram_size=0, eval_len=2, batch_size=7)
    for context, own, outputs in zip(
        contexts, phrases, decode(model, contexts, settings, [END], phrases), strict=True
    ):
        scores = scores_of_two_steps(model, context, settings.length_penalty)
        holding = [tokens for tokens in scores if all(holds([*tokens], phrase) for phrase in own)]
        allowed = holding or [tokens for tokens in scores if END not in tokens]
        best = sorted(allowed, key=lambda tokens: -scores[tokens])[:2]
        assert [(*output.tokens,) for output in outputs] == best
        assert [output.score for output in outputs] == pytest.approx([scores[one] for one in best], rel=1e-4)


def scores_of_two_steps(
    model: GPT2LMModel, context: list[int], penalty: float
) -> dict[tuple[int, ...], float]:
    """Of every output of the end token, or of another and any token behind it."""
    with torch.no_grad():
        inputs = torch.tensor([[*context, token] for token in range(VOCAB)])
        log_probs = model(inputs)[0][:, -2:].log_softmax(dim=-1)  # (first token, step, token)
    sums = log_probs[:, 0].diagonal()[:, None] + log_probs[:, 1]
    pairs = {(a, b): sums[a, b].item() / 2**penalty for a in range(VOCAB) for b in range(VOCAB) if a != END}
    return {(END,): log_probs[0, 0, END].item(), **pairs}


def test_what_cannot_be_said_in_time_is_left_out(model):
    settings = DecodingSettings(beam_size=4, eval_len=2)
    ((output, *_),) = decode(model, [[3, 4]], settings, [END], [[[1, 2, 3, 4]]])
    assert 0 < len(output.tokens) <= 2


def test_an_output_is_never_empty_for_a_phrase_that_cannot_be_said(model):
    """The phrase holds the end token, or repeats what may not be repeated: the best without it is given."""
    contexts = [[token] for token in range(VOCAB)]
    for phrase in ([3, END, 4], [5, 6, 7, 8, 5, 6, 7, 8]):
        found = decode(
            model, contexts, DecodingSettings(beam_size=1, eval_len=20), [END, 3], [[phrase]] * VOCAB
        )
        assert all(output.tokens for (output,) in found)
    settings = DecodingSettings(beam_size=VOCAB, eval_len=1, min_length=1)
    ((bound,),) = decode(model, [[1]], settings, [END], [[[END]]])
    assert bound == decode(model, [[1]], settings, [END])[0][0]


@pytest.mark.parametrize("other", [{"dialect": "hf"}, {"strategy": "sample"}, {"beam_groups": 2}])
def test_other_searches_take_no_phrases(model, other):
    kinds = {"dialect": Dialect, "strategy": Strategy}
    settings = DecodingSettings(**{k: kinds.get(k, int)(v) for k, v in other.items()}, eval_len=4)
    with pytest.raises(ValueError, match="phrases need strategy=beam"):
        decode(model, [[1]], settings, [END], [[[2]]])


def test_a_context_has_a_token(model):
    with pytest.raises(ValueError, match="a context has no token"):
        decode(model, [[1], []], DecodingSettings(eval_len=4), [END])
