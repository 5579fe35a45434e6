"""How sure a score and a difference are: the paired bootstrap over segments (Koehn 2004).

A corpus is drawn anew, segment by segment with replacement, many times, and scored each time by adding up the
statistics of what was drawn. NIST's information and CIDEr's document frequencies stay those of the whole
corpus.
"""

from typing import NamedTuple

import numpy as np

from lora_gpt2.evaluation.statistics import Array, Statistics

RESAMPLES = 1000


class Interval(NamedTuple):
    low: float
    high: float


def resampled(statistics: Statistics, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """(resamples,) scores of corpora drawn from the segments; the same seed draws the same segments."""
    count = len(statistics.segments)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return statistics.score(drawn @ statistics.segments)


def interval(scores: Array, share: float = 0.95) -> Interval:
    """The middle `share` of resampled scores."""
    low, high = np.quantile(scores, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(low), float(high))


def p_value(ours: Statistics, theirs: Statistics, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """How often chance alone would part two systems as far as they are apart, two-sided.

    Both over the same segments in the same order. Differences of resampled scores, less their mean, are what
    chance makes. Never 0: of 1,000 resamples 1 in 1,001 is the least.
    """
    differences = resampled(ours, resamples, seed) - resampled(theirs, resamples, seed)
    apart = abs(ours.of() - theirs.of())
    beyond = np.abs(differences - differences.mean()) >= apart
    return float((beyond.sum() + 1) / (resamples + 1))
