"""What detectors learn from in-distribution data: mergeable records that one pass feeds.

All are in float64 NumPy on the host. Merging is exact up to rounding, so that neither the order of
inputs nor their split over batches and processes matters.
"""

from gradnorm_jax.statistics.class_moments import (
    CLASS_SUMS,
    CORRECT_CLASS_SUMS,
    PREDICTED_CLASS_SUMS,
    UNIT_CLASS_SUMS,
    ClassSums,
    class_means,
    class_sums,
    tied_gaussians,
)
from gradnorm_jax.statistics.moments import (
    MOMENTS,
    UNIT_MOMENTS,
    Moments,
    covariance,
    mean,
    moments,
    principal_axes,
)
from gradnorm_jax.statistics.statistic import Examples, Statistic, learn, passes

__all__ = [
    "CLASS_SUMS",
    "CORRECT_CLASS_SUMS",
    "MOMENTS",
    "PREDICTED_CLASS_SUMS",
    "UNIT_CLASS_SUMS",
    "UNIT_MOMENTS",
    "ClassSums",
    "Examples",
    "Moments",
    "Statistic",
    "class_means",
    "class_sums",
    "covariance",
    "learn",
    "mean",
    "moments",
    "passes",
    "principal_axes",
    "tied_gaussians",
]
