"""Counts, sums and products of features by class: what Gaussians are fitted from."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.scores.feature import TiedGaussians
from gradnorm_jax.types import Outputs


class ClassMoments(NamedTuple):
    """Sums over labelled features, from which class means and the covariance follow.

    Attributes:
        counts: `[C]`, images per class.
        sums: `[C, D]`, sum of features per class.
        products: `[D, D]`, sum of outer products of features over all classes.
    """

    counts: np.ndarray
    sums: np.ndarray
    products: np.ndarray


def init(num_features: int, num_classes: int) -> ClassMoments:
    """The moments of no images."""
    return ClassMoments(
        np.zeros(num_classes),
        np.zeros((num_classes, num_features)),
        np.zeros((num_features, num_features)),
    )


def update(moments: ClassMoments, outputs: Outputs, labels: ArrayLike) -> ClassMoments:
    """The moments with one more batch.

    Args:
        moments: of the images before.
        outputs: features `[B, D]` and logits `[B, C]`.
        labels: `[B]`, in 0 .. C - 1.

    Raises:
        ValueError: a label is outside of the classes, or shapes do not match.
    """
    num_classes = len(moments.counts)
    return merge(moments, class_moments(outputs.features, labels, num_classes))


def merge(left: ClassMoments, right: ClassMoments) -> ClassMoments:
    """The moments of two disjoint sets of images together."""
    return ClassMoments(*map(np.add, left, right))


def class_moments(features: ArrayLike, labels: ArrayLike, num_classes: int) -> ClassMoments:
    """Moments of features `[N, D]` with labels `[N]` in 0 .. num_classes - 1.

    Raises:
        ValueError: a label is outside of the classes, or shapes do not match.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "features must be [N, D] and labels [N], got shapes "
            f"{features.shape} and {labels.shape}"
        )
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
