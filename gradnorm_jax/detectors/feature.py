"""Detectors of the feature space: Mahalanobis."""

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.statistics.class_moments import CLASS_SUMS, ClassSums, tied_gaussians
from gradnorm_jax.statistics.moments import MOMENTS, Moments
from gradnorm_jax.types import LinearHead, Model


def _gaussians(head: LinearHead, moments: Moments, sums: ClassSums) -> scores.TiedGaussians:
    return tied_gaussians(moments, sums)


_TIED_GAUSSIANS = Fit((MOMENTS, CLASS_SUMS), _gaussians)


@builder
def mahalanobis() -> Detector:
    """Distance to the nearest class mean of the training features; see `scores.mahalanobis`."""
    return Detector("mahalanobis", "outputs", _mahalanobis, _TIED_GAUSSIANS)


def _mahalanobis(state: scores.TiedGaussians, model: Model, batch: Batch) -> jax.Array:
    return scores.mahalanobis(batch.outputs.features, state)
