"""Is one detector better than another on the same inputs? Tests of differences of metrics."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnorm_jax.metrics.comparison import (
    FPR95,
    SMOOTH,
    Comparison,
    Smooth,
    fpr_difference,
    fpr_replicates,
    measure,
    smooth_difference,
)
from gradnorm_jax.metrics.intervals import check_options
from gradnorm_jax.metrics.metrics import fpr_at_tpr
from gradnorm_jax.metrics.ranked import Scores, check_scores


def delong_test(
    id_a: ArrayLike,
    ood_a: ArrayLike,
    id_b: ArrayLike,
    ood_b: ArrayLike,
    *,
    confidence: float = 0.95,
) -> Comparison:
    """DeLong's test of the difference of two AUROCs, in O(n log n), with ties.

    Args:
        id_a: `[N]`, detector A's scores of the ID inputs.
        ood_a: `[M]`, its scores of the OOD inputs.
        id_b: `[N]`, detector B's scores of the same ID inputs in the same order.
        ood_b: `[M]`, its scores of the same OOD inputs.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        AUROC of A less that of B.

    Raises:
        ValueError: the detectors score different numbers of inputs, or `confidence` is out of
            range.

    References:
        DeLong, DeLong, Clarke-Pearson (1988), "Comparing the Areas under Two or More Correlated
        Receiver Operating Characteristic Curves".
        Sun, Xu (2014), "Fast Implementation of DeLong's Algorithm".
    """
    check_options(confidence)
    id_scores, ood_scores = check_paired("id", id_a, id_b), check_paired("ood", ood_a, ood_b)
    return _smooth_test(SMOOTH["auroc"], id_scores, ood_scores, confidence)


def auroc_covariance(
    id_scores: ArrayLike, ood_scores: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The AUROCs of K detectors on the same inputs, and DeLong's estimate of their covariance.

    For any contrast w, w @ covariance @ w is the variance of w @ aurocs.

    Args:
        id_scores: `[K, N]`, N >= 2.
        ood_scores: `[K, M]`, M >= 2.

    Returns:
        `[K]` and `[K, K]`.

    Raises:
        ValueError: a set has a single input, or the numbers of detectors differ.
    """
    id_scores, ood_scores = np.atleast_2d(id_scores), np.atleast_2d(ood_scores)
    if len(id_scores) != len(ood_scores) or min(id_scores.shape[1], ood_scores.shape[1]) < 2:
        raise ValueError(
            "id_scores and ood_scores must be [K, N] and [K, M] of the same K detectors with at "
            f"least two inputs each, got {id_scores.shape} and {ood_scores.shape}"
        )
    measured = [
        measure(SMOOTH["auroc"], check_scores("id_scores", a), check_scores("ood_scores", b))
        for a, b in zip(id_scores, ood_scores, strict=True)
    ]
    covariance = np.zeros((len(measured), len(measured)))
    for parts in ([each.id for each in measured], [each.ood for each in measured]):
        covariance += np.cov(parts).reshape(covariance.shape) / len(parts[0])
    return np.array([each.value for each in measured]), covariance


def fpr_test(
    id_a: ArrayLike,
    ood_a: ArrayLike,
    id_b: ArrayLike,
    ood_b: ArrayLike,
    *,
    tpr: float = 0.95,
    positive: Literal["id", "ood"] = "id",
    confidence: float = 0.95,
    replicates: int = 500,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap of the difference of two `fpr_at_tpr`.

    Each replicate draws the inputs of each set anew, the same for both detectors. The interval is
    that of percentiles; the p-value comes from the standard error, since a fraction of replicates
    cannot be small enough to stand a correction for many comparisons.

    Args:
        id_a: `[N]`, detector A's scores of the ID inputs.
        ood_a: `[M]`, its scores of the OOD inputs.
        id_b: `[N]`, detector B's scores of the same ID inputs in the same order.
        ood_b: `[M]`, its scores of the same OOD inputs.
        tpr: true positive rate to reach, in (0, 1].
        positive: the class that counts as positive.
        confidence: coverage of the interval, in (0, 1).
        replicates: number of bootstrap replicates, at least 1.
        seed: of the bootstrap; equal seeds draw the same inputs, by their places in the arrays.

    Returns:
        FPR of A less that of B.

    Raises:
        ValueError: the detectors score different numbers of inputs, or an option is out of range.

    References:
        Efron, Tibshirani (1993), "An Introduction to the Bootstrap", chapters 8 and 13.
    """
    check_options(confidence, replicates)
    id_scores, ood_scores = check_paired("id", id_a, id_b), check_paired("ood", ood_a, ood_b)
    values = [
        fpr_at_tpr(*scores, tpr=tpr, positive=positive)
        for scores in zip(id_scores, ood_scores, strict=True)
    ]
    a, b = fpr_replicates(id_scores, ood_scores, tpr, positive, replicates, seed).T
    sizes = id_scores[0].size, ood_scores[0].size
    return fpr_difference(values[0] - values[1], a - b, sizes, confidence)


def compare_scores(
    id_a: ArrayLike,
    ood_a: ArrayLike,
    id_b: ArrayLike,
    ood_b: ArrayLike,
    *,
    confidence: float = 0.95,
    replicates: int = 500,
    seed: int = 0,
) -> dict[str, Comparison]:
    """All metrics of detector A less those of B on the same inputs, by their names in `Metrics`.

    AUROC by `delong_test`, AUPR likewise with the infinitesimal jackknife, FPR95 by `fpr_test`. The
    detection error is left out. For arguments and errors see `fpr_test`.
    """
    check_options(confidence, replicates)
    id_scores, ood_scores = check_paired("id", id_a, id_b), check_paired("ood", ood_a, ood_b)
    smooth = {
        name: _smooth_test(metric, id_scores, ood_scores, confidence)
        for name, metric in SMOOTH.items()
    }
    fpr = {
        name: fpr_test(
            *(id_a, ood_a, id_b, ood_b),
            positive=positive,
            confidence=confidence,
            replicates=replicates,
            seed=seed,
        )
        for name, positive in FPR95.items()
    }
    return smooth | fpr


def check_paired(name: str, a: ArrayLike, b: ArrayLike) -> tuple[Scores, Scores]:
    """The scores of two detectors in float64; ValueError unless they are of as many inputs."""
    scores = check_scores(f"{name}_a", a), check_scores(f"{name}_b", b)
    if scores[0].size != scores[1].size:
        raise ValueError(
            f"{name}_a and {name}_b must be scores of the same inputs, got {scores[0].size} and "
            f"{scores[1].size}"
        )
    return scores


def _smooth_test(
    metric: Smooth,
    id_scores: Sequence[Scores],
    ood_scores: Sequence[Scores],
    confidence: float,
) -> Comparison:
    a, b = (measure(metric, *sets) for sets in zip(id_scores, ood_scores, strict=True))
    return smooth_difference(a, b, confidence)
