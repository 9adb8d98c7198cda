"""Differences of metrics between detectors on the same inputs, and what is known of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradnorm_jax.metrics import influence, ranked, resampling
from gradnorm_jax.metrics.influence import Influence
from gradnorm_jax.metrics.intervals import reach
from gradnorm_jax.metrics.ranked import Ranking, Scores, rank_inputs


class Smooth(NamedTuple):
    """A metric that is, to first order, a mean over inputs."""

    value: Callable[[Ranking], float]
    influence: Callable[[Ranking], Influence]


class Measured(NamedTuple):
    """A smooth metric of one detector, and what each input, `[N]` and `[M]`, adds to it."""

    value: float
    id: Scores
    ood: Scores


SMOOTH: Mapping[str, Smooth] = {
    "auroc": Smooth(ranked.auroc, influence.auroc),
    "aupr_in": Smooth(ranked.average_precision, influence.average_precision),
    "aupr_out": Smooth(
        lambda ranking: ranked.average_precision(ranked.swap(ranking)),
        influence.average_precision_of_ood,
    ),
}
"""By their names in `Metrics`; so are the following."""
FPR95: Mapping[str, Literal["id", "ood"]] = {
    "fpr_at_95_tpr_id_positive": "id",
    "fpr_at_95_tpr_ood_positive": "ood",
}
"""Their positive class."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """By how much a metric of detector A exceeds that of detector B on the same inputs.

    Attributes:
        difference: A - B, in [-1, 1].
        standard_error: of the difference, as inputs vary; 1, the largest there is, where a set has
            a single input, which tells nothing.
        low: lower end of the confidence interval of the difference.
        high: upper end.
        p_value: two-sided, of the hypothesis that A and B do not differ: that of difference /
            standard_error in a normal distribution; 1 where the difference is 0.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        interval = f"{self.low:+.2%} to {self.high:+.2%}"
        return f"{self.difference:+.2%} ({interval}), p = {self.p_value:.2g}"


def measure(metric: Smooth, id_scores: Scores, ood_scores: Scores) -> Measured:
    """A metric of a detector, with what each input adds to it."""
    ranking, id_places, ood_places = rank_inputs(id_scores, ood_scores)
    parts = metric.influence(ranking)
    return Measured(metric.value(ranking), parts.id[id_places], parts.ood[ood_places])


def smooth_difference(a: Measured, b: Measured, confidence: float) -> Comparison:
    """A less B, by the variance of the difference of their parts."""
    difference = a.value - b.value
    if min(a.id.size, a.ood.size) == 1:
        return _unknown(difference)
    variance = (a.id - b.id).var(ddof=1) / a.id.size + (a.ood - b.ood).var(ddof=1) / a.ood.size
    margin = reach(confidence) * math.sqrt(variance)
    low, high = max(difference - margin, -1.0), min(difference + margin, 1.0)
    return _comparison(difference, math.sqrt(variance), low, high)


def fpr_replicates(
    id_scores: Sequence[Scores],
    ood_scores: Sequence[Scores],
    tpr: float,
    positive: Literal["id", "ood"],
    replicates: int,
    seed: int,
) -> NDArray[np.float64]:
    """`[replicates, K]`, the FPR of K detectors on the same resampled inputs."""
    rng = np.random.default_rng(seed)
    sets = id_scores, ood_scores
    if positive == "ood":
        sets = [-scores for scores in ood_scores], [-scores for scores in id_scores]
    return resampling.paired_fpr(*sets, tpr, replicates, rng)


def fpr_difference(
    difference: float, resampled: NDArray[np.float64], sizes: tuple[int, int], confidence: float
) -> Comparison:
    """A less B, by the differences `[replicates]` of resampled sets of these sizes."""
    if min(sizes) == 1:
        return _unknown(difference)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return _comparison(difference, float(resampled.std()), float(low), float(high))


def _comparison(difference: float, standard_error: float, low: float, high: float) -> Comparison:
    if difference == 0:
        p_value = 1.0
    elif standard_error == 0:
        p_value = 0.0
    else:
        p_value = math.erfc(abs(difference) / standard_error / math.sqrt(2))
    return Comparison(difference, standard_error, low, high, p_value)


def _unknown(difference: float) -> Comparison:
    return Comparison(difference, 1.0, -1.0, 1.0, 1.0)
