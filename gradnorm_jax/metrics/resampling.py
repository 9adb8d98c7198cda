"""Bootstrap replicates of `fpr_at_tpr`: each draws the inputs of either set anew, with replacement.

The threshold of a replicate is an order statistic of the positives, which says almost everything.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradnorm_jax.metrics import ranked
from gradnorm_jax.metrics.ranked import Ranking, Scores

_REACH = 6.0
"""How many standard deviations of a count a window extends: beyond is one replicate in 1e9."""
_REACH_OF_FEW = 25
"""Inputs more on each side, where counts are too small to be normal."""
_BLOCK = 2**22
"""How many numbers of a block of replicates are in memory at once."""


def fpr(ranking: Ranking, tpr: float, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`[count]`, `ranked.fpr_at_tpr` of resampled rankings, without drawing them.

    Of N draws from ranks 0 to N - 1 the n-th smallest is the floor of N times a Beta(n, N - n + 1)
    variate, and how many of M negatives pass a threshold is binomial.
    """
    found, passed = ranking.id.cumsum(), ranking.ood.cumsum()
    needed = ranked.count_needed(tpr, int(found[-1]))
    rank = np.floor(found[-1] * rng.beta(needed, found[-1] - needed + 1, size=count))
    threshold = np.searchsorted(found, rank.clip(max=found[-1] - 1), side="right")
    return rng.binomial(passed[-1], passed[threshold] / passed[-1]) / passed[-1]


def paired_fpr(
    positives: Sequence[Scores],
    negatives: Sequence[Scores],
    tpr: float,
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """`fpr_at_tpr` of several detectors on the same resampled inputs.

    How many of the inputs above some score are drawn varies by its square root, so the thresholds
    stay in a window, and of the inputs on either side of it only the number matters.

    Args:
        positives: `[N]` of each of K detectors, high for positives.
        negatives: `[M]` of each.
        tpr: true positive rate to reach.
        count: number of replicates.
        rng: draws the inputs.

    Returns:
        `[count, K]`.
    """
    size, others = positives[0].size, negatives[0].size
    needed = ranked.count_needed(tpr, size)
    reach = int(_REACH * np.sqrt(size * tpr * (1 - tpr))) + _REACH_OF_FEW
    low, high = max(needed - reach, 0), min(needed + reach, size)
    orders = [np.argsort(-scores) for scores in positives]
    other_orders = [np.argsort(-scores) for scores in negatives]
    # How many negatives pass at each threshold of the window.
    passing = [
        np.searchsorted(-scores[other_order], -at[order[low:high]], side="right")
        for at, order, scores, other_order in zip(
            positives, orders, negatives, other_orders, strict=True
        )
    ]
    found = _windows(orders, [(low, high)] * len(orders))
    passed = _windows(other_orders, [(each[0], each[-1]) for each in passing])
    rows = max(1, _BLOCK // max(size, others))
    rates = np.empty((count, len(positives)))
    for block in np.split(rates, range(rows, count, rows)):
        drawn = (_draw(each, len(block), rng) for each in (size, others))
        counts = zip(*map(_accumulate, drawn, (found, passed)), strict=True)
        for k, (positive, negative) in enumerate(counts):
            # The strictest threshold at which enough are found.
            threshold = (positive[:, 1:] < needed).sum(axis=1).clip(max=high - low - 1)
            place = passing[k][threshold] - passing[k][0]
            block[:, k] = negative[np.arange(len(block)), place]
    return rates / others


class _Windows(NamedTuple):
    """Of K detectors, which inputs are above a window, `[N, K]`, and which in it, from the top."""

    above: NDArray[np.floating]
    inside: Sequence[NDArray[np.intp]]


def _windows(orders: Sequence[NDArray[np.intp]], ends: Sequence[tuple[int, int]]) -> _Windows:
    # For a product of matrices; sums of integers are exact in float32 up to here.
    dtype = np.float32 if orders[0].size <= 2**24 else np.float64
    above = np.zeros((orders[0].size, len(orders)), dtype)
    for k, (order, (low, _)) in enumerate(zip(orders, ends, strict=True)):
        above[order[:low], k] = 1
    inside = [order[low:high].copy() for order, (low, high) in zip(orders, ends, strict=True)]
    return _Windows(above, inside)


def _draw(size: int, count: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """How often each of the inputs is drawn, `[size]`, in each replicate."""
    return [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(count)]


def _accumulate(
    drawn: Sequence[NDArray[np.intp]], windows: _Windows
) -> Iterator[NDArray[np.floating]]:
    """For each window `[R, high - low + 1]`: how often the first `low` to `high` are drawn."""
    weights = np.array(drawn, windows.above.dtype)
    above = weights @ windows.above
    for k, inside in enumerate(windows.inside):
        yield np.concatenate([above[:, [k]], weights[:, inside]], axis=1).cumsum(axis=1)
