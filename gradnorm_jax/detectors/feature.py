"""Detectors of the feature space: Mahalanobis distances, plain, relative, and of unit features."""

from typing import NamedTuple

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.numerics import unit_rows
from gradnorm_jax.scores import DiagonalGaussian, TiedGaussians
from gradnorm_jax.statistics.class_moments import (
    CLASS_SUMS,
    UNIT_CLASS_SUMS,
    ClassSums,
    background_gaussian,
    tied_gaussians,
)
from gradnorm_jax.statistics.moments import MOMENTS, UNIT_MOMENTS, Moments, diagonal_gaussian
from gradnorm_jax.types import LinearHead, Model


class _Relative(NamedTuple):
    """Gaussians of the classes, and that of all features."""

    gaussians: TiedGaussians
    background: TiedGaussians


def _gaussians(head: LinearHead, moments: Moments, sums: ClassSums) -> TiedGaussians:
    return tied_gaussians(moments, sums)


def _relative_gaussians(head: LinearHead, moments: Moments, sums: ClassSums) -> _Relative:
    return _Relative(tied_gaussians(moments, sums), background_gaussian(moments))


_OF_FEATURES = (MOMENTS, CLASS_SUMS)
_OF_UNIT_FEATURES = (UNIT_MOMENTS, UNIT_CLASS_SUMS)


def _diagonal(head: LinearHead, moments: Moments) -> DiagonalGaussian:
    return diagonal_gaussian(moments)


def _gaussian(state: DiagonalGaussian, model: Model, batch: Batch) -> jax.Array:
    return scores.gaussian(batch.outputs.features, state)


@builder
def gaussian() -> Detector:
    """Log density of independent Gaussian features; see `scores.gaussian`."""
    return Detector("gaussian", "outputs", _gaussian, Fit((MOMENTS,), _diagonal))


@builder
def mahalanobis() -> Detector:
    """Distance to the nearest class mean of the training features; see `scores.mahalanobis`.

    The covariance is a mean over images; pytorch-ood takes half the gradient of the sum, by which
    its distances are 1 / (2 N) of these.
    """
    return Detector("mahalanobis", "outputs", _mahalanobis, Fit(_OF_FEATURES, _gaussians))


@builder
def relative_mahalanobis() -> Detector:
    """Less the distance to all training features; see `scores.relative_mahalanobis`."""
    fit = Fit(_OF_FEATURES, _relative_gaussians)
    return Detector("relative_mahalanobis", "outputs", _relative_mahalanobis, fit)


@builder
def mahalanobis_plus_plus() -> Detector:
    """`mahalanobis` of features divided by their lengths, in training and after.

    References:
        Mueller, Hein (2025), "Mahalanobis++: Improving OOD Detection via Feature Normalization".
        https://arxiv.org/abs/2505.18032
    """
    fit = Fit(_OF_UNIT_FEATURES, _gaussians)
    return Detector("mahalanobis_plus_plus", "outputs", _of_unit_features, fit)


@builder
def relative_mahalanobis_plus_plus() -> Detector:
    """`relative_mahalanobis` of features divided by their lengths, in training and after.

    References:
        Mueller, Hein (2025). https://arxiv.org/abs/2505.18032
    """
    fit = Fit(_OF_UNIT_FEATURES, _relative_gaussians)
    return Detector("relative_mahalanobis_plus_plus", "outputs", _relative_of_unit_features, fit)


def _mahalanobis(state: TiedGaussians, model: Model, batch: Batch) -> jax.Array:
    return scores.mahalanobis(batch.outputs.features, state)


def _relative_mahalanobis(state: _Relative, model: Model, batch: Batch) -> jax.Array:
    return scores.relative_mahalanobis(batch.outputs.features, *state)


def _of_unit_features(state: TiedGaussians, model: Model, batch: Batch) -> jax.Array:
    return scores.mahalanobis(unit_rows(batch.outputs.features), state)


def _relative_of_unit_features(state: _Relative, model: Model, batch: Batch) -> jax.Array:
    return scores.relative_mahalanobis(unit_rows(batch.outputs.features), *state)
