"""ROUGE-L and CIDEr as the COCO caption tools and, through them, the E2E scorer compute them.

Both take texts that `ptb.tokenise` has tokenised and return one score a segment; the corpus score is their
mean. Sources: Lin 2004, section 3; Vedantam et al. 2015, section 6 (the CIDEr-D form with clipping and a
length penalty, which COCO's `Cider` computes).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ROUGE_BETA = 1.2
"""Weight of recall against precision, COCO's choice."""
CIDER_ORDER = 4
CIDER_SIGMA = 6.0
"""Width of the length penalty, in words."""

NGram = tuple[str, ...]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each segment, 0 to 1.

    COCO's rule: the best precision and the best recall are each taken over all references, so they may come
    from two different ones. An empty text counts as one empty token.
    """
    return [_rouge_l(output, group) for output, group in zip(predictions, references, strict=True)]


def _rouge_l(prediction: str, group: Sequence[str]) -> float:
    output, texts = prediction.split(" "), [text.split(" ") for text in group]
    common = [longest_common_subsequence(output, text) for text in texts]
    precision = max(common) / len(output)
    recall = max(length / len(text) for length, text in zip(common, texts, strict=True))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length in tokens, one row of the table per integer (Hyyrö 2004, bit-parallel LCS).

    Bit i of `row` is 0 where the subsequence grows at token i of `first`.
    """
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for token in second:
        grown = row & places.get(token, 0)
        row = (row + grown | row - grown) & everywhere
    return len(first) - row.bit_count()


class _Vector(NamedTuple):
    weights: list[dict[NGram, float]]
    """tf-idf of each n-gram, one dictionary per order."""
    norms: list[float]
    length: int
    """Number of bigrams: COCO measures the length in them."""


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of each segment, 0 to 10, with document frequencies from these references.

    A document is a segment's whole group of references, so the score of a single segment is always 0.
    """
    texts = [[_ngram_counts(text) for text in group] for group in references]
    documents = Counter(ngram for group in texts for ngram in set().union(*group))
    idf = {ngram: math.log(len(texts) / count) for ngram, count in documents.items()}
    unseen = math.log(len(texts))
    scores = []
    for prediction, group in zip(predictions, texts, strict=True):
        output = _vector(_ngram_counts(prediction), idf, unseen)
        similarity = sum(_similarity(output, _vector(text, idf, unseen)) for text in group)
        scores.append(10 * similarity / len(group))
    return scores


def _ngram_counts(text: str) -> Counter[NGram]:
    words = text.split()
    return Counter(
        ngram
        for n in range(1, CIDER_ORDER + 1)
        for ngram in zip(*(words[start:] for start in range(n)), strict=False)
    )


def _vector(counts: Counter[NGram], idf: dict[NGram, float], unseen: float) -> _Vector:
    weights: list[dict[NGram, float]] = [{} for _ in range(CIDER_ORDER)]
    length = 0
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
        length += count if len(ngram) == 2 else 0
    norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
    return _Vector(weights, norms, length)


def _similarity(output: _Vector, text: _Vector) -> float:
    """Mean over the orders of the clipped cosine, times a Gaussian of the difference in length."""
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        output.weights, text.weights, output.norms, text.norms, strict=True
    ):
        if our_norm and their_norm:
            shared = ours.keys() & theirs.keys()
            dot = math.fsum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in shared)
            total += dot / (our_norm * their_norm)  # fsum, as a set has no fixed order
    return total / CIDER_ORDER * math.exp(-((output.length - text.length) ** 2) / (2 * CIDER_SIGMA**2))
