"""Counts, sums and products of features: means, covariances and principal axes follow from them."""

import math
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.scores.feature import DiagonalGaussian
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead

Sums = TypeVar("Sums", bound=tuple[Any, ...])


class Moments(NamedTuple):
    """Sums over features `h`.

    Attributes:
        num_images: `[]`, how many there are.
        sum: `[D]`, of h.
        products: `[D, D]`, of h h^T.
    """

    num_images: np.ndarray
    sum: np.ndarray
    products: np.ndarray


def moments(features: ArrayLike) -> Moments:
    """The moments of features `[N, D]`, or of the rows of any `[..., D]`, in float64."""
    features = np.asarray(features, np.float64)
    features = features.reshape(math.prod(features.shape[:-1]), features.shape[-1])
    return Moments(np.array(float(len(features))), features.sum(axis=0), features.T @ features)


def merge_sums(left: Sums, right: Sums) -> Sums:
    """Two records of sums, added field by field."""
    return type(left)(*map(np.add, left, right))


def unit(features: ArrayLike) -> np.ndarray:
    """Features `[N, D]` in float64, each divided by its Euclidean norm; zeros stay zeros."""
    features = np.asarray(features, np.float64)
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.where(norms > 0, norms, 1.0)


def mean(moments: Moments) -> np.ndarray:
    """The mean feature `[D]`; ValueError if there are no features."""
    if not moments.num_images:
        raise ValueError("no training images to fit to; give at least one")
    return moments.sum / moments.num_images


def covariance(moments: Moments) -> np.ndarray:
    """(1/N) sum_i (h_i - mean)(h_i - mean)^T, `[D, D]`; ValueError if there are no features."""
    centre = mean(moments)
    return moments.products / moments.num_images - np.outer(centre, centre)


def diagonal_gaussian(moments: Moments) -> DiagonalGaussian:
    """Means and standard deviations of the features; ValueError if there are no features."""
    centre = mean(moments)
    second = moments.products.diagonal() / moments.num_images
    variances = second - centre**2
    # What the difference rounds to where a feature does not vary.
    varies = variances > 16 * np.finfo(np.float64).eps * second
    deviations = np.sqrt(np.where(varies, variances, 0.0))
    return DiagonalGaussian(jnp.asarray(centre), jnp.asarray(deviations))


class PrincipalAxes(NamedTuple):
    """Eigenvectors of a symmetric matrix `[D, D]`, by falling eigenvalue.

    Attributes:
        values: `[D]`, the eigenvalues.
        vectors: `[D, D]`, an eigenvector in each column.
    """

    values: np.ndarray
    vectors: np.ndarray


def principal_axes(matrix: np.ndarray) -> PrincipalAxes:
    """The eigenvectors of a symmetric matrix, such as a covariance."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return PrincipalAxes(values[::-1], vectors[:, ::-1])


def _none(head: LinearHead) -> Moments:
    return moments(np.zeros((0, len(head.kernel))))


def _update(value: Moments, examples: Examples) -> Moments:
    return merge_sums(value, moments(examples.features))


def _update_unit(value: Moments, examples: Examples) -> Moments:
    return merge_sums(value, moments(unit(examples.features)))


MOMENTS = Statistic("moments", _none, _update, merge_sums)
"""Of the features."""
UNIT_MOMENTS = Statistic("moments of unit features", _none, _update_unit, merge_sums)
"""Of the features divided by their norms."""
