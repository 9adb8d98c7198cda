"""Mean gradients of each class, projected from both sides so that they fit."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.gradient_subspace import AverageGradients
from gradnorm_jax.statistics.class_moments import check_labels
from gradnorm_jax.statistics.softmax import softmax
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class GradientSums(NamedTuple):
    """Sums of h p^T by class, in the coordinates of two bases.

    Attributes:
        output_basis: `[C, P]`, orthonormal.
        feature_basis: `[D, Q]`, orthonormal.
        counts: `[C]`, images per class.
        sums: `[C, P Q]`.
    """

    output_basis: np.ndarray
    feature_basis: np.ndarray
    counts: np.ndarray
    sums: np.ndarray


@functools.cache
def gradient_sums(rank: int = 64) -> Statistic:
    """Sums of the gradient h p^T of logsumexp z by true class, in `[C, rank, rank]` at most.

    Where there are more classes or features than `rank`, they are projected onto as many leading
    singular directions of the last layer's kernel; where there are fewer, nothing is lost.
    """
    init = functools.partial(_none, rank)
    return Statistic(f"gradient sums of rank {rank}", init, _update, _merge, needs_labels=True)


def average_gradients(sums: GradientSums) -> AverageGradients:
    """The mean gradient of each class that has images, scaled to length 1.

    Raises:
        ValueError: there are no labelled images, or all their features are zero.
    """
    # Means are multiples of sums, and have the same direction.
    lengths = np.linalg.norm(sums.sums, axis=1)
    present = lengths > 0
    if not present.any():
        raise ValueError("no labelled training images with features to take mean gradients of")
    means = sums.sums[present] / lengths[present, None]
    return AverageGradients(*map(jnp.asarray, (*sums[:2], means)))


def _none(rank: int, head: LinearHead) -> GradientSums:
    num_features, num_classes = head.kernel.shape
    left, _, right = np.linalg.svd(head.kernel, full_matrices=False)
    left = left[:, :rank] if rank < num_features else np.eye(num_features)
    right = right[:rank].T if rank < num_classes else np.eye(num_classes)
    sums = np.zeros((num_classes, right.shape[1] * left.shape[1]))
    return GradientSums(right, left, np.zeros(num_classes), sums)


def _update(value: GradientSums, examples: Examples) -> GradientSums:
    num_classes = len(value.counts)
    check_labels(examples.labels, num_classes)
    p = softmax(examples.logits) @ value.output_basis
    h = examples.features.astype(np.float64) @ value.feature_basis
    counts = np.bincount(examples.labels, minlength=num_classes)
    sums = value.sums.copy()
    for label in np.flatnonzero(counts):
        rows = examples.labels == label
        sums[label] += (p[rows].T @ h[rows]).reshape(-1)
    return value._replace(counts=value.counts + counts, sums=sums)


def _merge(left: GradientSums, right: GradientSums) -> GradientSums:
    # Both were projected alike: the bases follow from the last layer.
    return left._replace(counts=left.counts + right.counts, sums=left.sums + right.sums)
