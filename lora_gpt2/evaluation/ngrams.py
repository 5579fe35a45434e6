"""BLEU-4 and NIST-5 as the E2E challenge's scorer prints them (e2e-metrics with ``-p``).

Sources: Papineni et al. 2002 (BLEU), Doddington 2002 (NIST), mteval-v13a's tokens, lower-cased. Where the
scorer departs from sacrebleu or nltk, the lines below say so.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

BLEU_ORDER = 4
NIST_ORDER = 5
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""Sharpness of NIST's length penalty: an output of two thirds of the references' length gets 0.5."""

Tokens = list[str]
NGram = tuple[str, ...]

_tokenize = Tokenizer13a()  # type: ignore[no-untyped-call]  # sacrebleu leaves it untyped


class BleuNist(NamedTuple):
    bleu: float
    """0 to 1, or a little above where a perfect output has segments of fewer than four tokens."""
    nist: float
    """Bits of information per n-gram, from 0 up."""


def tokens_13a(text: str) -> Tokens:
    """Lower-cased mteval-v13a tokens. An empty text is one empty token, as in the official scorer."""
    return str(_tokenize(text)).lower().split(" ")


def bleu_and_nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> BleuNist:
    """Both scores over a corpus: one prediction and one or more references a segment.

    BLEU takes the reference length closest to the output's (of two, the shorter one); NIST the mean length.
    Both clip an n-gram at the most often that any one reference has it. Every output adds `length - n + 1`
    n-grams to the total, below zero too: the official rule for outputs shorter than n.
    """
    matches: list[Counter[NGram]] = [Counter() for _ in range(NIST_ORDER)]
    occurrences: Counter[NGram] = Counter()  # in all references; the empty n-gram counts the words
    output_length = closest_length = 0
    mean_length = 0.0
    for prediction, group in zip(predictions, references, strict=True):
        output, texts = tokens_13a(prediction), [tokens_13a(text) for text in group]
        for n in range(1, NIST_ORDER + 1):
            counts = [Counter(_ngrams(text, n)) for text in texts]
            for ngram, count in Counter(_ngrams(output, n)).items():
                clipped = min(count, max(reference[ngram] for reference in counts))
                if clipped:
                    matches[n - 1][ngram] += clipped
            for text in texts:
                occurrences.update(_ngrams(text, n))
        lengths = [len(text) for text in texts]
        occurrences[()] += sum(lengths)
        mean_length += sum(lengths) / len(lengths)
        closest_length += min(lengths, key=lambda length: (abs(length - len(output)), length))
        output_length += len(output)

    totals = [output_length - len(predictions) * n for n in range(NIST_ORDER)]
    return BleuNist(
        _bleu(matches, totals, output_length / closest_length),
        _nist(matches, totals, occurrences, output_length / mean_length),
    )


def _ngrams(tokens: Tokens, n: int) -> Iterator[NGram]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _bleu(matches: Sequence[Counter[NGram]], totals: Sequence[int], length_ratio: float) -> float:
    """Geometric mean of the precisions times the brevity penalty; 0 when some order has no match.

    The official scorer puts 1e-15 in place of a zero, which prints as 0.0000 as well.
    """
    hits = [matched.total() for matched in matches[:BLEU_ORDER]]
    if min(hits) == 0 or min(totals[:BLEU_ORDER]) <= 0:
        return 0.0
    log_precision = sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=False)) / BLEU_ORDER
    return math.exp(log_precision + min(0.0, 1 - 1 / length_ratio))


def _nist(
    matches: Sequence[Counter[NGram]], totals: Sequence[int], occurrences: Counter[NGram], length_ratio: float
) -> float:
    """Mean information of the matches, summed over the orders, times the length penalty.

    An n-gram's information is log2 of how often its first n - 1 words occur over how often it does, counted
    in all references. An order without any n-gram in the outputs adds nothing (officially a division by 0).
    """
    score = 0.0
    for matched, total in zip(matches, totals, strict=True):
        if total > 0:
            gained = (
                count * math.log2(occurrences[ngram[:-1]] / occurrences[ngram])
                for ngram, count in matched.items()
            )
            score += sum(gained) / total
    return score * math.exp(-NIST_BETA * math.log(min(1.0, length_ratio)) ** 2)
