"""The best of many detectors, and those that are not significantly worse."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnorm_jax.metrics.comparison import (
    FPR95,
    SMOOTH,
    Comparison,
    fpr_difference,
    fpr_replicates,
    measure,
    smooth_difference,
)
from gradnorm_jax.metrics.intervals import check_options
from gradnorm_jax.metrics.metrics import fpr_at_tpr
from gradnorm_jax.metrics.ranked import Scores, check_scores


@dataclasses.dataclass(frozen=True)
class Best:
    """The best detector by one metric on one data set, against each of the others.

    Attributes:
        detector: its name; the first of several with the same value.
        comparisons: the metric of the best less that of another, by the other's name.
        adjusted: the p-values of `comparisons` after Holm's correction.
    """

    detector: str
    comparisons: Mapping[str, Comparison]
    adjusted: Mapping[str, float]

    def leaders(self, level: float = 0.05) -> frozenset[str]:
        """The best and all that are not significantly worse at a level."""
        return frozenset({self.detector, *(d for d, p in self.adjusted.items() if p >= level)})


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values that may be compared with one level all together, by Holm's step-down correction.

    The chance that any true hypothesis is rejected is at most the level, however the tests depend
    on each other. The i-th smallest of m, from 0, is multiplied by m - i, and none is smaller than
    one before it.

    Args:
        p_values: `[m]`, in [0, 1].

    Returns:
        `[m]`, in [0, 1], in the order of `p_values`.

    Raises:
        ValueError: the p-values are not one-dimensional or not in [0, 1].

    References:
        Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must be numbers in [0, 1], [m], got {p_values!r}")
    order = p.argsort(kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)).clip(max=1)
    return adjusted


def compare_with_best(
    id_scores: Mapping[str, ArrayLike],
    ood_scores: Mapping[str, ArrayLike],
    metrics: Sequence[str] = ("auroc", "aupr_in", "fpr_at_95_tpr_id_positive"),
    *,
    confidence: float = 0.95,
    replicates: int = 500,
    seed: int = 0,
) -> dict[str, Best]:
    """For each metric, the best detector on a data set, and whether the others are worse.

    The comparisons by one metric on one data set are one family for `holm`. That the best was
    chosen by the same scores is not corrected for. Tests are those of `compare_scores`.

    Args:
        id_scores: `[N]` of each detector, of the same inputs in the same order.
        ood_scores: `[M]` of each.
        metrics: names of fields of `Metrics`, all but the detection error.
        confidence: coverage of the intervals, in (0, 1).
        replicates: number of bootstrap replicates for FPR95, at least 1.
        seed: of the bootstrap.

    Returns:
        By metric.

    Raises:
        ValueError: detectors differ between the sets or score different numbers of inputs, or a
            metric is not known.
    """
    check_options(confidence, replicates)
    if unknown := set(metrics) - {*SMOOTH, *FPR95}:
        raise ValueError(
            f"metrics must be among {', '.join([*SMOOTH, *FPR95])}, got {', '.join(unknown)}"
        )
    ids, oods = _check("id_scores", id_scores), _check("ood_scores", ood_scores)
    if ids.keys() != oods.keys() or not ids:
        raise ValueError(
            "id_scores and ood_scores must be of the same detectors, at least one, got "
            f"{', '.join(ids)} and {', '.join(oods)}"
        )

    def compare(metric: str) -> Best:
        if metric in SMOOTH:
            return _smooth(metric, ids, oods, confidence)
        return _fpr95(metric, ids, oods, confidence, replicates, seed)

    return {metric: compare(metric) for metric in metrics}


def _check(name: str, scores: Mapping[str, ArrayLike]) -> dict[str, Scores]:
    arrays = {d: check_scores(f"{name}[{d!r}]", each) for d, each in scores.items()}
    sizes = {d: each.size for d, each in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{name} must be of the same inputs, got as many of each: {sizes}")
    return arrays


def _smooth(
    metric: str, ids: Mapping[str, Scores], oods: Mapping[str, Scores], confidence: float
) -> Best:
    # Each is sorted again for its comparison: what all inputs add to all would fill the memory.
    values = {d: measure(SMOOTH[metric], ids[d], oods[d]).value for d in ids}
    best = max(values, key=values.__getitem__)
    top = measure(SMOOTH[metric], ids[best], oods[best])
    comparisons = {
        d: smooth_difference(top, measure(SMOOTH[metric], ids[d], oods[d]), confidence)
        for d in ids
        if d != best
    }
    return _correct(best, comparisons)


def _fpr95(
    metric: str,
    ids: Mapping[str, Scores],
    oods: Mapping[str, Scores],
    confidence: float,
    replicates: int,
    seed: int,
) -> Best:
    positive = FPR95[metric]
    values = {d: fpr_at_tpr(ids[d], oods[d], positive=positive) for d in ids}
    best = min(values, key=values.__getitem__)
    sets = [ids[d] for d in ids], [oods[d] for d in ids]
    columns = fpr_replicates(*sets, 0.95, positive, replicates, seed).T
    resampled = dict(zip(ids, columns, strict=True))
    sizes = ids[best].size, oods[best].size
    comparisons = {
        d: fpr_difference(
            values[best] - values[d], resampled[best] - resampled[d], sizes, confidence
        )
        for d in ids
        if d != best
    }
    return _correct(best, comparisons)


def _correct(best: str, comparisons: Mapping[str, Comparison]) -> Best:
    adjusted = holm([each.p_value for each in comparisons.values()]).tolist()
    return Best(best, comparisons, dict(zip(comparisons, adjusted, strict=True)))
