"""Scores of a corpus as functions of sums over its segments: any choice of them is scored by adding up."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Statistics(NamedTuple):
    """What one metric knows of each segment, and how their sum becomes its score."""

    segments: Array
    """(segments, columns)."""
    score: Callable[[Array], Array]
    """Sums (…, columns) to scores (…)."""

    def of(self, numbers: Sequence[int] | slice = slice(None)) -> float:
        """The score of these segments as a corpus; by default of all."""
        return float(self.score(self.segments[numbers].sum(axis=0)))


def mean(values: Sequence[float]) -> Statistics:
    """Of a metric that is the mean over its segments."""
    return Statistics(np.stack([np.array(values), np.ones(len(values))], axis=-1), _mean)


def _mean(sums: Array) -> Array:
    result: Array = sums[..., 0] / sums[..., 1]
    return result
