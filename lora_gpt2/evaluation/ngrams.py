"""BLEU-4 and NIST-5 as the E2E challenge's scorer prints them (e2e-metrics with ``-p``).

Sources: Papineni et al. 2002 (BLEU), Doddington 2002 (NIST), mteval-v13a's tokens, lower-cased. Where the
scorer departs from sacrebleu or nltk, the lines below say so.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lora_gpt2.evaluation.statistics import Array

BLEU_ORDER = 4
NIST_ORDER = 5
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""Sharpness of NIST's length penalty: an output of two thirds of the references' length gets 0.5."""

Tokens = list[str]
NGram = tuple[str, ...]

_tokenize = Tokenizer13a()  # type: ignore[no-untyped-call]  # sacrebleu leaves it untyped


def tokens_13a(text: str) -> Tokens:
    """Lower-cased mteval-v13a tokens. An empty text is one empty token, as in the official scorer."""
    return str(_tokenize(text)).lower().split(" ")


def ngram_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """(segments, 13): what `bleu` and `nist` need of each, one prediction and one or more references.

    Matches of 1 to 4 tokens, the information of matches of 1 to 5 tokens, tokens of the output, of the
    reference of closest length (of two, the shorter one), and of its references on average, and 1.

    An n-gram is clipped at the most often that any one reference has it. Its information is log2 of how often
    its first n - 1 words occur over how often it does, counted in all references.
    """
    matches: list[Counter[NGram]] = []
    occurrences: Counter[NGram] = Counter()  # in all references; the empty n-gram counts the words
    lengths = []
    for prediction, group in zip(predictions, references, strict=True):
        output, texts = tokens_13a(prediction), [tokens_13a(text) for text in group]
        matched: Counter[NGram] = Counter()
        for n in range(1, NIST_ORDER + 1):
            counts = [Counter(_ngrams(text, n)) for text in texts]
            for ngram, count in Counter(_ngrams(output, n)).items():
                clipped = min(count, max(reference[ngram] for reference in counts))
                if clipped:
                    matched[ngram] = clipped
            for text in texts:
                occurrences.update(_ngrams(text, n))
        matches.append(matched)
        sizes = [len(text) for text in texts]
        occurrences[()] += sum(sizes)
        closest = min(sizes, key=lambda size: (abs(size - len(output)), size))
        lengths.append([len(output), closest, sum(sizes) / len(sizes), 1])
    return np.array(
        [
            [*_hits(matched), *_information(matched, occurrences), *sizes]
            for matched, sizes in zip(matches, lengths, strict=True)
        ]
    )


def _ngrams(tokens: Tokens, n: int) -> Iterator[NGram]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _hits(matched: Counter[NGram]) -> list[float]:
    hits = [0.0] * BLEU_ORDER
    for ngram, count in matched.items():
        if len(ngram) <= BLEU_ORDER:
            hits[len(ngram) - 1] += count
    return hits


def _information(matched: Counter[NGram], occurrences: Counter[NGram]) -> list[float]:
    gained = [0.0] * NIST_ORDER
    for ngram, count in matched.items():
        gained[len(ngram) - 1] += count * math.log2(occurrences[ngram[:-1]] / occurrences[ngram])
    return gained


def bleu(sums: Array) -> Array:
    """Sums (…, 13) of `ngram_statistics` to BLEU-4 (…), 0 to 1, or a little above where a perfect output has
    segments of fewer than four tokens.

    Geometric mean of the precisions times the brevity penalty; 0 when some order has no match: the official
    scorer puts 1e-15 in place of a zero, which prints as 0.0000 as well.
    """
    hits, totals = sums[..., :BLEU_ORDER], _totals(sums, BLEU_ORDER)
    some = (hits.min(axis=-1) > 0) & (totals.min(axis=-1) > 0)
    share = np.where(some[..., None], hits, 1.0) / np.where(some[..., None], totals, 1.0)
    penalty = np.minimum(0.0, 1 - sums[..., -3] / sums[..., -4])
    result: Array = np.where(some, np.exp(np.log(share).mean(axis=-1) + penalty), 0.0)
    return result


def nist(sums: Array) -> Array:
    """Sums (…, 13) of `ngram_statistics` to NIST-5 (…), bits of information per n-gram, from 0 up.

    Mean information of the matches, summed over the orders, times the length penalty. An order without any
    n-gram in the outputs adds nothing (officially a division by 0).
    """
    gained, totals = sums[..., BLEU_ORDER : BLEU_ORDER + NIST_ORDER], _totals(sums, NIST_ORDER)
    means = np.where(totals > 0, gained, 0.0) / np.where(totals > 0, totals, 1.0)
    ratio = np.minimum(1.0, sums[..., -4] / sums[..., -2])
    result: Array = means.sum(axis=-1) * np.exp(-NIST_BETA * np.log(ratio) ** 2)
    return result


def _totals(sums: Array, orders: int) -> Array:
    """(…, orders): an output adds `length - n + 1`, below zero too: the official rule for short ones."""
    result: Array = sums[..., -4, None] - sums[..., -1, None] * np.arange(orders)
    return result
