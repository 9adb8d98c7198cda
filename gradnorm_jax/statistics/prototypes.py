"""Prototypes of classes and of what is foreign, and training gradients with respect to them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.scores.grood import GroodBank, Prototypes, prototype_gradient
from gradnorm_jax.statistics.bank import Rows
from gradnorm_jax.statistics.class_moments import ClassSums, class_means

_gradients = jax.jit(prototype_gradient)


def prototypes(sums: ClassSums, foreign: ArrayLike | None = None) -> Prototypes:
    """Class means of training features, and a prototype of what is foreign.

    Args:
        sums: of training features, by label.
        foreign: `[N, D]`, features of images to take the mean of; by default, those class means
            themselves, so that no out-of-distribution images are needed.

    Raises:
        ValueError: there are no labelled images, or the features are of another size.
    """
    means = class_means(sums)
    others = means if foreign is None else np.asarray(foreign, np.float64)
    if others.ndim != 2 or others.shape[1] != means.shape[1] or not len(others):
        raise ValueError(
            f"foreign features must be [N, {means.shape[1]}], as those of the network, got shape "
            f"{others.shape}"
        )
    return Prototypes(jnp.asarray(means), jnp.asarray(others.mean(axis=0)))


def grood_bank(rows: Rows, prototypes: Prototypes) -> GroodBank:
    """The gradients of those training images that are predicted as labelled.

    Raises:
        ValueError: there are none.
    """
    features = rows.features[rows.labels == rows.predictions]
    if not len(features):
        raise ValueError(
            f"none of {len(rows.labels)} training images is predicted as it is labelled; check "
            "that labels are the network's classes"
        )

    # In blocks, as distances to all classes are [N, C].
    blocks = (features[start : start + 4096] for start in range(0, len(features), 4096))
    gradients = [_gradients(block, prototypes) for block in blocks]
    return GroodBank(prototypes, jnp.concatenate(gradients))


def read_features(path: pathlib.Path) -> np.ndarray:
    """Features `[N, D]` from a .npy file.

    Raises:
        ValueError: there is no such file, or it holds no array of numbers.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read features from {path}: {error}") from error
