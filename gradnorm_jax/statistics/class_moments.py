"""Counts and sums of features by class, and the Gaussians that are fitted with them."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.scores.feature import TiedGaussians
from gradnorm_jax.statistics.moments import (
    Moments,
    covariance,
    mean,
    merge_sums,
    principal_axes,
    unit,
)
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class ClassSums(NamedTuple):
    """Sums over features by class.

    Attributes:
        counts: `[C]`, images per class.
        sums: `[C, D]`, sum of features per class.
    """

    counts: np.ndarray
    sums: np.ndarray


def class_sums(features: ArrayLike, labels: ArrayLike, num_classes: int) -> ClassSums:
    """Sums of features `[N, D]` with labels `[N]` in 0 .. num_classes - 1, in float64.

    Raises:
        ValueError: a label is outside of the classes, or shapes do not match.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "features must be [N, D] and labels [N], got shapes "
            f"{features.shape} and {labels.shape}"
        )
    check_labels(labels, num_classes)
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, features)
    return ClassSums(np.bincount(labels, minlength=num_classes).astype(np.float64), sums)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError unless labels `[N]` are all in 0 .. num_classes - 1."""
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise ValueError(
            f"{outside.size} training images have labels outside of 0..{num_classes - 1} (such as "
            f"{outside[0]}, -1 meaning none); class means need images labelled with the "
            "network's classes: give class subfolders or a CSV of labels"
        )


def class_means(sums: ClassSums) -> np.ndarray:
    """The mean feature of each class that has images, `[K, D]`; ValueError if none has."""
    present = sums.counts > 0
    if not present.any():
        raise ValueError("no labelled training images to fit class means to")
    return sums.sums[present] / sums.counts[present, None]


def tied_gaussians(moments: Moments, sums: ClassSums) -> TiedGaussians:
    """Maximum-likelihood class means and shared covariance of the given moments.

    The covariance is (1/N) sum_i (h_i - mu_{y_i})(h_i - mu_{y_i})^T. Directions in which training
    features do not vary are left out, as by a pseudo-inverse.

    >>> tied_gaussians(moments(features), class_sums(features, labels, num_classes))

    Raises:
        ValueError: there are no images, or no feature varies within its class.
    """
    means = class_means(sums)
    present = sums.counts > 0
    within = (moments.products - sums.sums[present].T @ means) / moments.num_images
    where = f"within {len(means)} classes, so they have no covariance: give more images per class"
    return _whiten(moments, within, means, where)


def background_gaussian(moments: Moments) -> TiedGaussians:
    """The one Gaussian of all features, whatever their class, in the shape of `TiedGaussians`.

    Raises:
        ValueError: there are no images, or no feature varies.
    """
    means = mean(moments)[None]
    return _whiten(moments, covariance(moments), means, "at all: give more images")


def _whiten(moments: Moments, matrix: np.ndarray, means: np.ndarray, where: str) -> TiedGaussians:
    """Gaussians of covariance `matrix` about `means` `[K, D]`, seen from the mean of all."""
    variances, directions = principal_axes(matrix)
    # What the difference of sums above rounds away cannot be told from zero.
    largest = moments.products.diagonal().max() / moments.num_images
    kept = variances > largest * len(variances) * np.finfo(np.float64).eps
    if not kept.any():
        raise ValueError(
            f"the features of {int(moments.num_images)} training images do not vary {where}"
        )
    whitening = directions[:, kept] / np.sqrt(variances[kept])
    centre = mean(moments)
    return TiedGaussians(
        jnp.asarray(centre), jnp.asarray(whitening), jnp.asarray((means - centre) @ whitening)
    )


def _none(head: LinearHead) -> ClassSums:
    num_features, num_classes = head.kernel.shape
    return ClassSums(np.zeros(num_classes), np.zeros((num_classes, num_features)))


def _statistic(
    name: str,
    select: Callable[[Examples], tuple[ArrayLike, ArrayLike]],
    *,
    needs_labels: bool = True,
) -> Statistic:
    def update(value: ClassSums, examples: Examples) -> ClassSums:
        return merge_sums(value, class_sums(*select(examples), len(value.counts)))

    return Statistic(name, _none, update, merge_sums, needs_labels=needs_labels)


def _correct(examples: Examples) -> tuple[ArrayLike, ArrayLike]:
    correct = examples.logits.argmax(axis=-1) == examples.labels
    return examples.features[correct], examples.labels[correct]


CLASS_SUMS = _statistic("class sums", lambda e: (e.features, e.labels))
"""Of the features, by label."""
UNIT_CLASS_SUMS = _statistic("class sums of unit features", lambda e: (unit(e.features), e.labels))
"""Of the features divided by their norms, by label."""
PREDICTED_CLASS_SUMS = _statistic(
    "class sums by prediction",
    lambda e: (e.features, e.logits.argmax(axis=-1)),
    needs_labels=False,
)
"""Of the features, by predicted class."""
CORRECT_CLASS_SUMS = _statistic("class sums of correct predictions", _correct)
"""Of the features of inputs that are predicted as labelled, by label."""
