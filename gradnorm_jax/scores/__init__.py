"""Pure score functions; in all of them higher means more in-distribution."""

from gradnorm_jax.scores.feature import TiedGaussians, mahalanobis
from gradnorm_jax.scores.gradient import (
    feature_norm,
    gradnorm,
    gradnorm_by_autodiff,
    gradnorm_of_parameters,
    one_hot_prediction,
    residual_norm,
    smoothed_prediction,
)
from gradnorm_jax.scores.output import energy, msp, odin

__all__ = [
    "TiedGaussians",
    "energy",
    "feature_norm",
    "gradnorm",
    "gradnorm_by_autodiff",
    "gradnorm_of_parameters",
    "mahalanobis",
    "msp",
    "odin",
    "one_hot_prediction",
    "residual_norm",
    "smoothed_prediction",
]
