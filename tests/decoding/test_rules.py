import math
from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_gpt2.decoding.rules import forbid, forbid_repeated_ngrams, penalise_repetition

VOCAB = 5
histories = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=9), min_size=1, max_size=4)


def logits(count: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(count))


def test_nothing_said_changes_nothing():
    before = logits(3)
    after = before.clone()
    nothing = torch.zeros(3, dtype=torch.long)
    penalise_repetition(after, torch.zeros(3, 4, dtype=torch.long), nothing, nothing, 2.0)
    forbid_repeated_ngrams(after, torch.zeros(3, 4, dtype=torch.long), nothing, nothing, 1)
    assert torch.equal(before, after)


def padded(history: list[list[int]], random: Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows between tokens that must not be read, with their starts and stops."""
    size = max(map(len, history)) + 3
    table = torch.tensor([[random.randrange(VOCAB) for _ in range(size)] for _ in history])
    starts = [random.randint(0, size - len(row)) for row in history]
    for line, start, row in zip(table, starts, history, strict=True):
        line[start : start + len(row)] = torch.tensor(row)
    return table, torch.tensor(starts), torch.tensor(starts) + torch.tensor([len(row) for row in history])


@given(histories, st.sampled_from([0.5, 1.0, 1.3, 2.0]), st.randoms(use_true_random=False))
def test_repetition_costs_once_whatever_the_sign_and_the_count(history, penalty, random):
    before = logits(len(history))
    after = before.clone()
    penalise_repetition(after, *padded(history, random), penalty)
    for row, tokens in enumerate(history):
        for token in range(VOCAB):
            value = before[row, token]
            if token in tokens:
                value = value / penalty if value >= 0 else value * penalty
            assert torch.equal(after[row, token], value)


@given(histories, st.integers(0, 5), st.randoms(use_true_random=False))
def test_no_ngram_can_occur_twice(history, size, random):
    before = logits(len(history))
    after = before.clone()
    forbid_repeated_ngrams(after, *padded(history, random), size)
    for row, tokens in enumerate(history):
        seen = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)} if size else set()
        for token in range(VOCAB):
            repeats = (*tokens[len(tokens) - size + 1 :], token) in seen
            assert float(after[row, token]) == (-math.inf if repeats else float(before[row, token]))


def test_forbidden_tokens_become_impossible_in_their_rows_and_no_others():
    before = logits(2)
    after = before.clone()
    forbid(after, torch.tensor([False, True]), torch.tensor([1, 4]))
    assert after[1, [1, 4]].eq(-math.inf).all()
    assert torch.equal(after[1, [0, 2, 3]], before[1, [0, 2, 3]])
    assert torch.equal(after[0], before[0])
