"""The beam search of transformers, against transformers; groups and samples against their definitions."""

import random

import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from lora_gpt2.decoding.config import DecodingSettings, Dialect, EarlyStopping
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel

VOCAB = 40
STOPPING = {EarlyStopping.heuristic: False, EarlyStopping.first: True, EarlyStopping.never: "never"}


@pytest.fixture(scope="module")
def pair() -> tuple[GPT2LMModel, GPT2LMHeadModel]:
    """The same weights in both programs."""
    torch.manual_seed(0)
    ours = GPT2LMModel(GPT2Config(VOCAB, 48, 48, 16, 2, 2, initializer_range=0.6)).eval()
    sizes = {"n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2}
    theirs = GPT2LMHeadModel(HFConfig(vocab_size=VOCAB, **sizes, bos_token_id=0, eos_token_id=0)).eval()
    assert theirs.load_state_dict(dict(ours.weights()), strict=False).missing_keys == ["lm_head.weight"]
    return ours, theirs


@pytest.mark.parametrize("seed", range(80))
def test_dialect_hf_equals_transformers(pair, seed):
    rng = random.Random(seed)
    beams = rng.choice([2, 3, 5, 8])
    settings = DecodingSettings(
        dialect=Dialect.hf,
        early_stopping=rng.choice(list(EarlyStopping)),
        beam_size=beams,
        n_best=rng.randint(1, beams),
        length_penalty=rng.choice([-0.5, 0.0, 0.8, 1.0, 2.0]),
        no_repeat_ngram_size=rng.choice([0, 2, 3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        min_length=rng.choice([0, 3]),
        eval_len=rng.choice([1, 5, 16]),
    )
    ends = rng.sample(range(VOCAB), rng.choice([1, 2]))
    contexts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(3)]
    check(pair, settings, ends, contexts)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_when_dialect_hf_stops_is_when_transformers_does(pair, length_penalty):
    """Where a fourth of the tokens end an output, it matters: the three ways give other ones."""
    contexts = [[token, 2 * token % VOCAB] for token in range(VOCAB)]
    outputs = [
        check(pair, DecodingSettings(
            dialect=Dialect.hf, early_stopping=stopping, beam_size=3, n_best=2,
            length_penalty=length_penalty, eval_len=12,
        ), list(range(0, VOCAB, 4)), contexts)
        for stopping in EarlyStopping
    ]  # fmt: skip
    assert len({str(one) for one in outputs}) > 1


def check(
    pair: tuple[GPT2LMModel, GPT2LMHeadModel],
    settings: DecodingSettings,
    ends: list[int],
    contexts: list[list[int]],
) -> list[list[int]]:
    """Compares outputs and scores; returns the best outputs."""
    ours, theirs = pair
    outputs = decode(ours, contexts, settings, ends)
    for context, found in zip(contexts, outputs, strict=True):
        expected = theirs.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            num_beams=settings.beam_size,
            num_return_sequences=settings.n_best,
            early_stopping=STOPPING[settings.early_stopping],
            length_penalty=settings.length_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            repetition_penalty=settings.repetition_penalty,
            min_new_tokens=settings.min_length,
            max_new_tokens=settings.eval_len,
            eos_token_id=ends,
            pad_token_id=VOCAB - 1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for hypothesis, sequence, score in zip(
            found,
            expected.sequences[:, len(context) :].tolist(),
            expected.sequences_scores.tolist(),
            strict=True,
        ):
            assert hypothesis.tokens == sequence[: len(hypothesis.tokens)], (settings, ends, context)
            assert hypothesis.score == pytest.approx(score, rel=1e-4, abs=1e-5)
    return [found[0].tokens for found in outputs]
