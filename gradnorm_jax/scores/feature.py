"""Scores of the features, by distances to what training images of each class look like."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


class ClassMoments(NamedTuple):
    """Sums over labelled features, from which class means and the covariance follow.

    In float64 on the host. The moments of two disjoint sets of images add up to those of their
    union, entry by entry, which is how batches and hosts are merged.

    Attributes:
        counts: `[C]`, images per class.
        sums: `[C, D]`, sum of features per class.
        products: `[D, D]`, sum of outer products of features over all classes.
    """

    counts: np.ndarray
    sums: np.ndarray
    products: np.ndarray


class TiedGaussians(NamedTuple):
    """One Gaussian per class, all with the same covariance, in whitened coordinates.

    Attributes:
        centre: `[D]`, the mean of all features, taken off before whitening to keep digits.
        whitening: `[D, R]` with whitening @ whitening.T the pseudo-inverse of the covariance.
        means: `[K, R]`, whitened means of the K classes that have images.
    """

    centre: jax.Array
    whitening: jax.Array
    means: jax.Array


def class_moments(features: ArrayLike, labels: np.ndarray, num_classes: int) -> ClassMoments:
    """Moments of features `[B, D]` with labels `[B]` in 0 .. num_classes - 1.

    Raises:
        ValueError: a label is outside of that range.
    """
    features = np.asarray(features, np.float64)
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise ValueError(
            f"{outside.size} training images have labels outside of 0..{num_classes - 1} (such as "
            f"{outside[0]}, -1 meaning none); class means need images labelled with the "
            "network's classes: give class subfolders or a CSV of labels"
        )
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, features)
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    return ClassMoments(counts, sums, features.T @ features)


def tied_gaussians(moments: ClassMoments) -> TiedGaussians:
    """Maximum-likelihood class means and shared covariance of the given moments.

    The covariance is (1/N) sum_i (h_i - mu_{y_i})(h_i - mu_{y_i})^T. Directions in which training
    features do not vary are left out, as by a pseudo-inverse.

    Raises:
        ValueError: there are no images, or no feature varies within its class.
    """
    present = moments.counts > 0
    if not present.any():
        raise ValueError("no labelled training images to fit class means to")
    counts, sums = moments.counts[present, None], moments.sums[present]
    means = sums / counts
    covariance = (moments.products - sums.T @ means) / counts.sum()
    variances, directions = np.linalg.eigh((covariance + covariance.T) / 2)
    # What the difference of sums above rounds away cannot be told from zero.
    largest = moments.products.diagonal().max() / counts.sum()
    kept = variances > largest * len(variances) * np.finfo(np.float64).eps
    if not kept.any():
        raise ValueError(
            f"the features of {int(counts.sum())} training images do not vary within "
            f"{len(counts)} classes, so they have no covariance: give more images per class"
        )
    whitening = directions[:, kept] / np.sqrt(variances[kept])
    centre = sums.sum(axis=0) / counts.sum()
    return TiedGaussians(
        jnp.asarray(centre), jnp.asarray(whitening), jnp.asarray((means - centre) @ whitening)
    )


def mahalanobis(features: jax.Array, gaussians: TiedGaussians) -> jax.Array:
    r"""Negative squared Mahalanobis distance to the nearest class mean.

    .. math:: S = -\min_c (h - \mu_c)^T \Sigma^{-1} (h - \mu_c)

    Args:
        features: `[B, D]`.
        gaussians: of training features, from `tied_gaussians`.

    Returns:
        `[B]`, at most zero; higher is more in-distribution.

    References:
        Lee, Lee, Lee, Shin (2018), "A Simple Unified Framework for Detecting Out-of-Distribution
        Samples and Adversarial Attacks", equation 2, for the penultimate layer alone.
        https://arxiv.org/abs/1807.03888
    """
    precise = jax.lax.Precision.HIGHEST
    centre, whitening, means = gaussians
    centred = features.astype(centre.dtype) - centre[None]
    whitened = jnp.matmul(centred, whitening, precision=precise)
    squared = (
        (whitened**2).sum(axis=-1, keepdims=True)
        - 2 * jnp.matmul(whitened, means.T, precision=precise)
        + (means**2).sum(axis=-1)[None]
    )
    return -jnp.maximum(squared.min(axis=-1), 0.0)
