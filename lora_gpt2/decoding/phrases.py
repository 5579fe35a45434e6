"""Phrases that an output must contain: beams are shared out by how much of them is said.

After Post and Vilar 2018 (dynamic beam allocation): every beam may go on with a token that a phrase asks for,
and the places are dealt in turn to the beams that have said more and to those that have said less.
"""

from collections.abc import Sequence
from typing import NamedTuple

Phrases = Sequence[Sequence[int]]
"""Tokens of each phrase."""


class Candidate(NamedTuple):
    """A continuation of a beam."""

    parent: int
    token: int
    log_prob: float
    running: float
    """Sum of log-probabilities, this token included."""


def missing(tokens: Sequence[int], phrases: Phrases) -> list[Sequence[int]]:
    """The phrases that are not in `tokens`."""
    return [phrase for phrase in phrases if not _contains(tokens, phrase)]


def wanted(tokens: Sequence[int], phrases: Phrases) -> list[int]:
    """The tokens that would begin or continue a missing phrase."""
    return [phrase[_begun(tokens, phrase)] for phrase in missing(tokens, phrases)]


def said(tokens: Sequence[int], phrases: Phrases) -> int:
    """How many tokens of the phrases are said: those of whole ones, and of the one that is being said."""
    left = missing(tokens, phrases)
    whole = sum(map(len, phrases)) - sum(map(len, left))
    return whole + max((_begun(tokens, phrase) for phrase in left), default=0)


def allocate(
    candidates: Sequence[Candidate], histories: Sequence[Sequence[int]], phrases: Phrases, count: int
) -> list[Candidate]:
    """At most `count` of the different `candidates`, best first, dealt in turn to how much each has said."""
    banks: dict[int, list[Candidate]] = {}
    for candidate in sorted(set(candidates), key=lambda c: (-c.running, c.parent, c.token)):
        amount = said([*histories[candidate.parent], candidate.token], phrases)
        banks.setdefault(amount, []).append(candidate)
    order = sorted(banks, reverse=True)
    rounds = max(map(len, banks.values()), default=0)
    dealt = [banks[amount][i] for i in range(rounds) for amount in order if i < len(banks[amount])]
    return sorted(dealt[:count], key=lambda c: (-c.running, c.parent, c.token))


def _contains(tokens: Sequence[int], phrase: Sequence[int]) -> bool:
    size = len(phrase)
    return any(list(tokens[i : i + size]) == list(phrase) for i in range(len(tokens) - size + 1))


def _begun(tokens: Sequence[int], phrase: Sequence[int]) -> int:
    """Tokens of the phrase that the end of `tokens` is the beginning of."""
    longest = min(len(tokens), len(phrase) - 1)
    return next((n for n in range(longest, 0, -1) if list(tokens[-n:]) == list(phrase[:n])), 0)
