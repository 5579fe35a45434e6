import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_gpt2.decoding.rules import forbid, forbid_repeated_ngrams, penalise_repetition

VOCAB = 5
histories = st.integers(0, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length), min_size=1, max_size=4
    )
)


def logits(count: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(count))


@given(histories, st.sampled_from([0.5, 1.0, 1.3, 2.0]))
def test_repetition_costs_once_whatever_the_sign_and_the_count(history, penalty):
    before = logits(len(history))
    after = penalise_repetition(before, torch.tensor(history).long(), penalty)
    for row, tokens in enumerate(history):
        for token in range(VOCAB):
            value = before[row, token]
            if token in tokens:
                value = value / penalty if value >= 0 else value * penalty
            assert torch.equal(after[row, token], value)


@given(histories, st.integers(0, 5))
def test_no_ngram_can_occur_twice(history, size):
    before = logits(len(history))
    after = forbid_repeated_ngrams(before, torch.tensor(history).long(), size)
    for row, tokens in enumerate(history):
        seen = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)} if size else set()
        for token in range(VOCAB):
            repeats = (*tokens[len(tokens) - size + 1 :], token) in seen
            assert float(after[row, token]) == (-math.inf if repeats else float(before[row, token]))


def test_forbidden_tokens_become_impossible_and_no_others():
    before = logits(2)
    after = forbid(before, [1, 4])
    assert after[:, [1, 4]].eq(-math.inf).all()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
