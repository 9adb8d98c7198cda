"""Detectors of the feature space: Mahalanobis."""

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.statistics import class_moments
from gradnorm_jax.types import Model

_TIED_GAUSSIANS = Fit(
    class_moments.init, class_moments.update, class_moments.merge, class_moments.tied_gaussians
)


@builder
def mahalanobis() -> Detector:
    """Distance to the nearest class mean of the training features; see `scores.mahalanobis`."""
    return Detector("mahalanobis", "outputs", _mahalanobis, _TIED_GAUSSIANS)


def _mahalanobis(state: scores.TiedGaussians, model: Model, batch: Batch) -> jax.Array:
    return scores.mahalanobis(batch.outputs.features, state)
