"""Bootstrap replicates of `fpr_at_tpr`: each draws the inputs of either set anew, with replacement.

The threshold of a replicate is an order statistic of the positives, which says almost everything.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gradnorm_jax.metrics import ranked
from gradnorm_jax.metrics.ranked import Ranking, Scores

_REACH = 6.0
"""How many standard deviations of a count a window extends: beyond is one replicate in 1e9."""
_REACH_OF_FEW = 25
"""Inputs more on each side, where counts are too small to be normal."""
_BLOCK = 2**24
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
    found, passed, passing = [], [], []
    for scores, other_scores in zip(positives, negatives, strict=True):
        order, other_order = np.argsort(-scores), np.argsort(-other_scores)
        thresholds = scores[order[low:high]]
        # How many negatives pass at each of them.
        passes = np.searchsorted(-other_scores[other_order], -thresholds, side="right")
        found.append(_Window(order, low, high))
        passed.append(_Window(other_order, passes[0], passes[-1]))
        passing.append(passes - passes[0])
    rows = max(1, _BLOCK // max(size, others))
    rates = np.empty((count, len(positives)))
    for block in np.split(rates, range(rows, count, rows)):
        counts = zip(
            _accumulate(_draw(size, len(block), rng), found),
            _accumulate(_draw(others, len(block), rng), passed),
            strict=True,
        )
        for k, (positive, negative) in enumerate(counts):
            # The strictest threshold at which enough are found.
            threshold = (positive[:, 1:] < needed).sum(axis=1).clip(max=high - low - 1)
            block[:, k] = negative[np.arange(len(block)), passing[k][threshold]] / others
    return rates


class _Window:
    """Of inputs from the highest score down, those from `low` to `high`, and which are above."""

    def __init__(self, order: NDArray[np.intp], low: int, high: int) -> None:
        self.inside = order[low:high].copy()
        self.is_above = np.zeros(order.size, np.float32)
        self.is_above[order[:low]] = 1


def _draw(size: int, count: int, rng: np.random.Generator) -> NDArray[np.floating]:
    """`[count, size]`, how often each input is drawn."""
    # For a product of matrices, exact in float32 up to here.
    weights = np.empty((count, size), np.float32 if size <= 2**24 else np.float64)
    for row in weights:
        row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
    return weights


def _accumulate(
    weights: NDArray[np.floating], windows: Sequence[_Window]
) -> Iterator[NDArray[np.floating]]:
    """For each window `[R, high - low + 1]`: how often the first `low` to `high` are drawn."""
    above = weights @ np.stack([window.is_above for window in windows], axis=1)
    for k, window in enumerate(windows):
        inside = np.concatenate([above[:, [k]], weights[:, window.inside]], axis=1)
        yield inside.cumsum(axis=1)
