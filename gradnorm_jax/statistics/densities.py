"""Densities of features and of randomly turned logits, learned after their ranges."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.weiper import Densities, Perturbation, Range, image_densities, logit_range
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class Ranges(NamedTuple):
    """Extrema of what training images give.

    Attributes:
        head: the last layer, in float32.
        features: of their features.
        logits: of their perturbed logits.
    """

    head: LinearHead
    features: Range
    logits: Range


class DensitySums(NamedTuple):
    """Sums of the images' densities.

    Attributes:
        head: the last layer, in float32.
        num_images: `[]`, how many there are.
        densities: of which the densities are sums over images, in float64.
    """

    head: LinearHead
    num_images: np.ndarray
    densities: Densities


@functools.cache
def ranges(perturbation: Perturbation) -> Statistic:
    """The ranges of features and perturbed logits."""

    def init(head: LinearHead) -> Ranges:
        nothing = Range(np.array(np.inf, np.float32), np.array(-np.inf, np.float32))
        return Ranges(_float32(head), nothing, nothing)

    def update(value: Ranges, examples: Examples) -> Ranges:
        if not len(examples.features):
            return value
        features = np.asarray(examples.features, np.float32)
        found = _logit_range(features, *value.head, perturbation=perturbation)
        own = Range(features.min(), features.max())
        return _widen(value, value._replace(features=own, logits=Range(*map(np.asarray, found))))

    return Statistic(f"ranges of {perturbation}", init, update, _widen)


@functools.cache
def density_sums(perturbation: Perturbation, bins: int) -> Statistic:
    """The sums of densities, learned after the ranges."""

    def init(head: LinearHead, found: Ranges) -> DensitySums:
        nothing = np.zeros(bins)
        return DensitySums(
            found.head, np.zeros(()), Densities(found.features, found.logits, nothing, nothing)
        )

    def update(value: DensitySums, examples: Examples) -> DensitySums:
        features = np.asarray(examples.features, np.float32)
        own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), value.densities)
        found = _image_densities(features, *value.head, own, perturbation=perturbation)
        sums = own._replace(
            feature_density=np.asarray(found[0], np.float64).sum(axis=0),
            logit_density=np.asarray(found[1], np.float64).sum(axis=0),
        )
        return _add(value, DensitySums(value.head, np.array(len(features)), sums))

    name = f"densities of {perturbation} in {bins} bins"
    return Statistic(name, init, update, _add, (ranges(perturbation),))


def mean_densities(value: DensitySums) -> Densities:
    """The mean density of the images; ValueError if there are none."""
    if not value.num_images:
        raise ValueError("no training images to fit to; give at least one")
    features, logits, *sums = value.densities
    return Densities(features, logits, *(x / value.num_images for x in sums))


_logit_range = jax.jit(logit_range, static_argnames="perturbation")
_image_densities = jax.jit(image_densities, static_argnames="perturbation")


def _float32(head: LinearHead) -> LinearHead:
    return LinearHead(*(np.asarray(x, np.float32) for x in head))


def _widen(left: Ranges, right: Ranges) -> Ranges:
    return Ranges(left.head, *map(_union, left[1:], right[1:]))


def _union(left: Range, right: Range) -> Range:
    return Range(np.minimum(left.low, right.low), np.maximum(left.high, right.high))


def _add(left: DensitySums, right: DensitySums) -> DensitySums:
    one, other = left.densities, right.densities
    sums = one._replace(
        feature_density=one.feature_density + other.feature_density,
        logit_density=one.logit_density + other.logit_density,
    )
    return DensitySums(left.head, left.num_images + right.num_images, sums)
