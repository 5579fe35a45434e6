"""What a search is in the middle of, without how it goes on.

Q queries, each at its own length; K beams, V vocabulary, L longest output, N outputs kept.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Hypothesis(NamedTuple):
    tokens: list[int]
    """The output, end token included."""
    score: float
    """Sum of log-probabilities / length ** length_penalty."""
    log_probs: list[float]
    """Of each token, after the rules."""


@dataclass
class Beams:
    """What is alive, and the N best that are finished."""

    said: Tensor  # (Q, S) right-aligned: what counts as said before the output
    said_lengths: Tensor  # (Q,)
    chances: Tensor  # (Q, K, L) uniform, of sampling
    lengths: Tensor  # (Q,) tokens so far
    running: Tensor  # (Q, K) sums of log-probabilities; -inf: not alive
    tokens: Tensor  # (Q, K, L)
    log_probs: Tensor  # (Q, K, L)
    best_scores: Tensor  # (Q, N) descending; -inf: none yet
    best_lengths: Tensor  # (Q, N)
    best_tokens: Tensor  # (Q, N, L)
    best_log_probs: Tensor  # (Q, N, L)

    def alive(self) -> Tensor:
        """(N,) of the Q * K beams."""
        return (self.running > -torch.inf).flatten().nonzero().squeeze(1)

    def spread(self, values: Tensor, missing: float) -> Tensor:
        """Values (N, M) of the beams that are alive as (Q * K, M)."""
        whole = values.new_full((self.running.numel(), values.size(1)), missing)
        whole[self.alive()] = values
        return whole

    def extended(self, choice: "Choice") -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities (Q, M, L) of the continuations."""
        last = self.lengths[:, None, None].expand(*choice.tokens.shape, 1)
        tokens = rows_of(self.tokens, choice.parents).scatter_(2, last, choice.tokens[..., None])
        log_probs = rows_of(self.log_probs, choice.parents).scatter_(2, last, choice.log_probs[..., None])
        return tokens, log_probs

    def keep(self, rows: Tensor) -> "Beams":
        """The queries `rows` alone, in this order."""
        return Beams(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Tensor, others: "Beams") -> None:
        """`others` replace the queries `rows`."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(others, field.name)

    def hypotheses(self, row: int, count: int) -> list[Hypothesis]:
        """The best outputs of a query, best first; an empty one where all was forbidden."""
        found = []
        for i, score in enumerate(self.best_scores[row, :count].tolist()):
            length = int(self.best_lengths[row, i])
            tokens, log_probs = self.best_tokens[row, i, :length], self.best_log_probs[row, i, :length]
            if score > -torch.inf or i == 0:
                found.append(Hypothesis(tokens.tolist(), score, log_probs.tolist()))
        return found


class Choice(NamedTuple):
    """Continuations of beams, (Q, M) each."""

    parents: Tensor
    tokens: Tensor
    log_probs: Tensor
    running: Tensor

    def at(self, columns: Tensor) -> "Choice":
        return Choice(*(x.gather(1, columns) for x in self))


def rows_of(sequences: Tensor, rows: Tensor) -> Tensor:
    """(Q, K, L) -> (Q, M, L): of each query the sequences `rows` (Q, M)."""
    return sequences.gather(1, rows[..., None].expand(-1, -1, sequences.size(2)))
