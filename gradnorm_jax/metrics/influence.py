"""What every input adds to a metric, from which its variance and that of differences follow.

A metric is, to first order, a mean over the ID inputs plus a mean over the OOD inputs of one number
each. For the AUROC these numbers are DeLong's placements, and exact; for average precision they are
the infinitesimal jackknife.

References:
    DeLong, DeLong, Clarke-Pearson (1988), "Comparing the Areas under Two or More Correlated
    Receiver Operating Characteristic Curves".
    Efron (1982), "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 6.
    Sun, Xu (2014), "Fast Implementation of DeLong's Algorithm".
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradnorm_jax.metrics.ranked import Ranking, swap

Values = NDArray[np.float64]


class Influence(NamedTuple):
    """What an input of each distinct score adds, `[V]`, up to one constant for each set."""

    id: Values
    ood: Values


def auroc(ranking: Ranking) -> Influence:
    """The fraction of OOD that an ID input beats, and of ID that beats an OOD input."""
    return Influence(1 - _above(ranking.ood), _above(ranking.id))


def average_precision(ranking: Ranking) -> Influence:
    """Of `ranked.average_precision`: the derivative by the weight of an input, times their number.

    An input counts in the precision at its own score and at all below.
    """
    found, passed = ranking.id.cumsum(), ranking.ood.cumsum()
    slope = ranking.id / (found + passed) ** 2.0
    gain = (slope * passed)[::-1].cumsum()[::-1]
    loss = (slope * found)[::-1].cumsum()[::-1]
    return Influence(found / (found + passed) + gain, -(passed[-1] / found[-1]) * loss)


def average_precision_of_ood(ranking: Ranking) -> Influence:
    """Of average precision with OOD as the positive class, by negated scores."""
    swapped = average_precision(swap(ranking))
    return Influence(swapped.ood[::-1], swapped.id[::-1])


def detection_error(ranking: Ranking) -> Influence:
    """Whether an input is on the wrong side of the best threshold, halved.

    That the threshold is the best moves with the inputs too, which is of second order.
    """
    found, passed = (counts.cumsum() / counts.sum() for counts in ranking)
    best = np.argmax(found - passed)
    passes = np.arange(found.size) <= best
    return Influence(~passes / 2, passes / 2)


def variance(ranking: Ranking, influence: Influence) -> float:
    """The variance of the metric; infinite if a set has one input, which tells nothing of it."""
    total = 0.0
    for counts, values in zip(ranking, influence, strict=True):
        size = int(counts.sum())
        if size == 1:
            return math.inf
        mean = (counts * values).sum() / size
        total += float((counts * (values - mean) ** 2).sum() / (size - 1) / size)
    return total


def _above(counts: NDArray[np.int64]) -> Values:
    """The fraction of a set above each distinct score, with half of that at it."""
    passed = counts.cumsum()
    return (passed - counts / 2) / passed[-1]
