"""How well scores separate in-distribution (ID) from out-of-distribution (OOD) inputs.

Everything is exact, in float64 NumPy on the host. All functions take the scores of the two sets,
`[N]` and `[M]`, where higher means more in-distribution, and every metric is in [0, 1]. An input
passes as ID at a threshold if its score is equal to it or higher; equal scores pass or fail
together, so the order in which ties are listed never matters.

>>> from gradnorm_jax import metrics
>>> metrics.auroc([3.0, 2.0, 2.0, 1.0], [2.0, 0.0])
0.75
>>> print(metrics.evaluate_scores(id_scores, ood_scores))  # all of them, with intervals
>>> print(metrics.delong_test(id_a, ood_a, id_b, ood_b))  # is detector A better than B?

Raised by all: ValueError if a set is empty, is not one-dimensional, or holds a score that is not
finite.
"""

from gradnorm_jax.metrics.best import Best, compare_with_best, holm
from gradnorm_jax.metrics.comparison import Comparison
from gradnorm_jax.metrics.intervals import Estimate, Metrics, evaluate_scores
from gradnorm_jax.metrics.metrics import (
    aupr_in,
    aupr_out,
    auroc,
    detection_error,
    fpr_at_tpr,
    threshold_at_tpr,
)
from gradnorm_jax.metrics.paired import (
    auroc_covariance,
    compare_scores,
    delong_test,
    fpr_test,
)

__all__ = [
    "Best",
    "Comparison",
    "Estimate",
    "Metrics",
    "aupr_in",
    "aupr_out",
    "auroc",
    "auroc_covariance",
    "compare_scores",
    "compare_with_best",
    "delong_test",
    "detection_error",
    "evaluate_scores",
    "fpr_at_tpr",
    "fpr_test",
    "holm",
    "threshold_at_tpr",
]
