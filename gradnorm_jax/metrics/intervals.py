"""All metrics of a table cell, each with its confidence interval."""

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnorm_jax.metrics import influence, ranked, resampling
from gradnorm_jax.metrics.influence import Influence, variance
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

    The interval of the AUROC is DeLong's; that of AUPR is normal in its log-odds, and that of the
    detection error normal, with the variance of the infinitesimal jackknife. Those of FPR95 are
    bias-corrected percentiles of a bootstrap that resamples each set by itself. An interval shrinks
    to its value where the sets do not overlap, and is [0, 1] where a set has a single score, which
    tells nothing about its spread.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]`.
        confidence: coverage of the intervals, in (0, 1).
        replicates: number of bootstrap replicates, at least 1.
        seed: of the bootstrap; equal seeds give equal intervals, in whatever order scores come.

    Returns:
        Each field of `Metrics` with its interval.

    Raises:
        ValueError: `confidence` or `replicates` is out of range.

    References:
        DeLong, DeLong, Clarke-Pearson (1988), "Comparing the Areas under Two or More Correlated
        Receiver Operating Characteristic Curves".
        Boyd, Eng, Page (2013), "Area under the Precision-Recall Curve: Point Estimates and
        Confidence Intervals", for log-odds.
        Efron (1981), "Nonparametric Standard Errors and Confidence Intervals", section 7.
    """
    check_options(confidence, replicates)
    ranking = rank(id_scores, ood_scores)
    swapped = swap(ranking)

    def fpr(ranking: Ranking) -> Estimate:
        value = ranked.fpr_at_tpr(ranking, 0.95)
        resampled = resampling.fpr(ranking, 0.95, replicates, np.random.default_rng(seed))
        return Estimate(value, *_percentiles(value, resampled, confidence))

    metrics = Metrics(
        auroc=_normal(ranking, ranked.auroc, influence.auroc, confidence),
        aupr_in=_normal_in_log_odds(ranking, confidence),
        aupr_out=_normal_in_log_odds(swapped, confidence),
        fpr_at_95_tpr_id_positive=fpr(ranking),
        fpr_at_95_tpr_ood_positive=fpr(swapped),
        detection_error=_normal(
            ranking, ranked.detection_error, influence.detection_error, confidence
        ),
    )
    if min(ranking.id.sum(), ranking.ood.sum()) > 1:
        return metrics
    return Metrics(*(Estimate(metric.value, 0.0, 1.0) for metric in vars(metrics).values()))


def check_options(confidence: float, replicates: int = 1) -> None:
    """ValueError if they are out of range."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")


def reach(confidence: float) -> float:
    """How many standard deviations a normal interval extends to either side."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _normal(
    ranking: Ranking,
    metric: Callable[[Ranking], float],
    influence_of: Callable[[Ranking], Influence],
    confidence: float,
) -> Estimate:
    value = metric(ranking)
    margin = reach(confidence) * math.sqrt(variance(ranking, influence_of(ranking)))
    return Estimate(value, max(value - margin, 0.0), min(value + margin, 1.0))


def _normal_in_log_odds(ranking: Ranking, confidence: float) -> Estimate:
    value = ranked.average_precision(ranking)
    deviation = math.sqrt(variance(ranking, influence.average_precision(ranking)))
    if value == 1 or math.isinf(deviation):
        return Estimate(value, value, value)
    log_odds = math.log(value / (1 - value))
    margin = reach(confidence) * deviation / (value * (1 - value))
    # The logistic function, which does not overflow so.
    low, high = ((1 + math.tanh(x / 2)) / 2 for x in (log_odds - margin, log_odds + margin))
    return Estimate(value, low, high)


def _percentiles(
    value: float, resampled: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Efron's bias-corrected percentiles of a metric's bootstrap replicates."""
    normal = NormalDist()
    below = np.mean(resampled < value) + np.mean(resampled == value) / 2
    # A fraction of exactly 0 or 1 is only known to within half a replicate.
    margin = 0.5 / resampled.size
    bias = normal.inv_cdf(float(np.clip(below, margin, 1 - margin)))
    z = reach(confidence)
    low, high = np.quantile(resampled, [normal.cdf(2 * bias + side) for side in (-z, z)])
    return float(low), float(high)
