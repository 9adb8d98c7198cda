"""The one sort that all metrics are made from, and each metric as a function of it."""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Scores = NDArray[np.float64]


class Ranking(NamedTuple):
    """How many of each set have each distinct score, `[V]`, from the highest score down.

    Every metric is a function of these counts alone, which makes a bootstrap replicate cheap: its
    counts change, the order does not.
    """

    id: Counts
    ood: Counts


def rank(id_scores: ArrayLike, ood_scores: ArrayLike) -> Ranking:
    """The ranking of the scores `[N]` and `[M]`; ValueError if they are not fit to be ranked."""
    id_scores = check_scores("id_scores", id_scores)
    ood_scores = check_scores("ood_scores", ood_scores)
    return rank_inputs(id_scores, ood_scores)[0]


def rank_inputs(
    id_scores: Scores, ood_scores: Scores
) -> tuple[Ranking, NDArray[np.intp], NDArray[np.intp]]:
    """The ranking, and where in it each ID input `[N]` and each OOD input `[M]` is."""
    distinct, place = np.unique(-np.concatenate([id_scores, ood_scores]), return_inverse=True)
    places = place[: id_scores.size], place[id_scores.size :]
    return Ranking(*(np.bincount(each, minlength=distinct.size) for each in places)), *places


def check_scores(name: str, scores: ArrayLike) -> Scores:
    """`scores` in float64; ValueError unless they are `[N]`, N >= 1, and finite."""
    array = np.asarray(scores).astype(np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one score per input, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: give at least one score of each class")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array))
        raise ValueError(
            f"{name} must be finite, but {bad.size} of {array.size} are not: leave out or mend "
            f"those at indices {bad[:5].tolist()}{' ...' if bad.size > 5 else ''}"
        )
    return array


def count_needed(tpr: float, total: int) -> int:
    """How many of `total` make up a fraction `tpr` of them."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be above 0 and at most 1, got {tpr}")
    # In floating point 0.07 x 100 is above 7, and one positive too many would be asked for.
    return math.ceil(Fraction(str(tpr)) * total)


def swap(ranking: Ranking) -> Ranking:
    """The ranking by negated scores, with OOD in the place of ID."""
    return Ranking(ranking.ood[::-1], ranking.id[::-1])


def auroc(ranking: Ranking) -> float:
    """Area under the ROC curve, a ratio of two integers."""
    passed = ranking.ood.cumsum()
    twice_below = 2 * (passed[-1] - passed) + ranking.ood
    return float(ranking.id @ twice_below / (2 * passed[-1] * ranking.id.sum()))


def average_precision(ranking: Ranking) -> float:
    """Average precision with `ranking.id` as the positive class."""
    # Recall is gained where there are positives, and only there.
    at = np.flatnonzero(ranking.id)
    gained = ranking.id[at]
    found = gained.cumsum()
    precision = found / (found + ranking.ood.cumsum()[at])
    # Not a dot product: BLAS would round by its number of threads.
    return float((gained * precision).sum() / found[-1])


def fpr_at_tpr(ranking: Ranking, tpr: float) -> float:
    """Fraction of `ranking.ood` at or above the score that `tpr` of `ranking.id` reach."""
    found = ranking.id.cumsum()
    last = np.searchsorted(found, count_needed(tpr, int(found[-1])))
    return int(ranking.ood[: last + 1].sum()) / int(ranking.ood.sum())


def detection_error(ranking: Ranking) -> float:
    """Lowest mean of the two error rates at any threshold."""
    found, passed = ranking.id.cumsum(), ranking.ood.cumsum()
    positives, negatives = found[-1], passed[-1]
    # The largest TPR - FPR as a fraction of integers: exact, and in place, which is twice as fast.
    found *= negatives
    passed *= positives
    found -= passed
    return float((1 - np.max(found) / (positives * negatives)) / 2)
