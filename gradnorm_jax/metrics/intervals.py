"""All metrics of a table cell, each with its confidence interval."""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnorm_jax.metrics import ranked
from gradnorm_jax.metrics.ranked import Ranking, rank, swap


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric and the interval in which it is known.

    Attributes:
        value: the metric on the scores at hand.
        low: lower end of its confidence interval.
        high: upper end of its confidence interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})"


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The metrics of one table cell: one detector on one OOD set.

    Attributes:
        auroc: see `auroc`. Higher is better.
        aupr_in: see `aupr_in`. Higher is better.
        aupr_out: see `aupr_out`. Higher is better.
        fpr_at_95_tpr_id_positive: `fpr_at_tpr` in the paper's convention. Lower is better.
        fpr_at_95_tpr_ood_positive: `fpr_at_tpr` in OpenOOD's convention. Lower is better.
        detection_error: see `detection_error`. Lower is better.
    """

    auroc: Estimate
    aupr_in: Estimate
    aupr_out: Estimate
    fpr_at_95_tpr_id_positive: Estimate
    fpr_at_95_tpr_ood_positive: Estimate
    detection_error: Estimate

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self)]
        width = max(map(len, names))
        return "\n".join(f"{name:{width}}  {getattr(self, name)}" for name in names)


def evaluate_scores(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    *,
    confidence: float = 0.95,
    replicates: int = 500,
    seed: int = 0,
) -> Metrics:
    """The metrics of one table cell with confidence intervals, from one sort.

    The interval of the AUROC is DeLong's. The others are bias-corrected percentiles of a bootstrap
    that resamples each set by itself. An interval shrinks to its value where the sets do not
    overlap, and is [0, 1] where a set has a single score, which tells nothing about its spread.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.
        confidence: coverage of the intervals, in (0, 1).
        replicates: number of bootstrap replicates, at least 1; time is proportional to it, memory
            does not depend on it.
        seed: of the bootstrap; equal seeds give equal intervals, in whatever order scores come.

    Returns:
        Each field of `Metrics` with its interval.

    Raises:
        ValueError: `confidence` or `replicates` is out of range.

    References:
        DeLong, DeLong, Clarke-Pearson (1988), "Comparing the Areas under Two or More Correlated
        Receiver Operating Characteristic Curves".
        Efron (1981), "Nonparametric Standard Errors and Confidence Intervals", section 7.
        Sun, Xu (2014), "Fast Implementation of DeLong's Algorithm".
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")
    ranking = rank(id_scores, ood_scores)
    values = (ranked.auroc(ranking), *_metrics(ranking))
    if min(ranking.id.sum(), ranking.ood.sum()) == 1:
        return Metrics(*(Estimate(value, 0.0, 1.0) for value in values))
    resampled = _bootstrap(ranking, replicates, seed).T
    intervals = [
        _delong(ranking, confidence),
        *(_percentiles(*each, confidence) for each in zip(values[1:], resampled, strict=True)),
    ]
    return Metrics(*(Estimate(v, *ends) for v, ends in zip(values, intervals, strict=True)))


def _metrics(ranking: Ranking) -> tuple[float, ...]:
    """The values in the order of the fields of `Metrics`, of which the first is left out."""
    swapped = swap(ranking)
    return (
        ranked.average_precision(ranking),
        ranked.average_precision(swapped),
        ranked.fpr_at_tpr(ranking, 0.95),
        ranked.fpr_at_tpr(swapped, 0.95),
        ranked.detection_error(ranking),
    )


def _bootstrap(ranking: Ranking, replicates: int, seed: int) -> NDArray[np.float64]:
    """`[replicates, metrics]`, each of a resampled ranking."""
    rng = np.random.default_rng(seed)
    size = ranking.id.size
    positions = [np.repeat(np.arange(size), counts) for counts in ranking]

    def resample() -> Ranking:
        draws = (each[rng.integers(each.size, size=each.size)] for each in positions)
        return Ranking(*(np.bincount(draw, minlength=size) for draw in draws))

    return np.array([_metrics(resample()) for _ in range(replicates)])


def _percentiles(
    value: float, resampled: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Efron's bias-corrected percentiles of a metric's bootstrap replicates."""
    normal = NormalDist()
    below = np.mean(resampled < value) + np.mean(resampled == value) / 2
    # A fraction of exactly 0 or 1 is only known to within half a replicate.
    margin = 0.5 / resampled.size
    bias = normal.inv_cdf(float(np.clip(below, margin, 1 - margin)))
    reach = normal.inv_cdf((1 + confidence) / 2)
    low, high = np.quantile(resampled, [normal.cdf(2 * bias + z) for z in (-reach, reach)])
    return float(low), float(high)


def _delong(ranking: Ranking, confidence: float) -> tuple[float, float]:
    """DeLong's interval of the AUROC, clipped to [0, 1]; both sets have at least two scores."""
    variance = 0.0
    for positive, negative in (ranking, swap(ranking)):
        passed = negative.cumsum()
        # For each positive, the fraction of negatives that it beats.
        wins = 1 - (passed - negative / 2) / passed[-1]
        count = positive.sum()
        mean = (positive * wins).sum() / count
        variance += (positive * (wins - mean) ** 2).sum() / (count - 1) / count
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    value = ranked.auroc(ranking)
    return max(value - margin, 0.0), min(value + margin, 1.0)
