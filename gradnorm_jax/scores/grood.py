"""GROOD: distances between gradients with respect to a prototype of what is foreign."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import divide_or_zero
from gradnorm_jax.scores.arrays import as_fitted_features, check_width, project, squared_norm


class Prototypes(NamedTuple):
    """What a feature is compared with.

    Attributes:
        classes: `[K, D]`, means of the training features of K classes.
        foreign: `[D]`, the prototype that stands for all else.
    """

    classes: jax.Array
    foreign: jax.Array


class GroodBank(NamedTuple):
    """Prototypes, and gradients of training images.

    Attributes:
        prototypes: of training features.
        gradients: `[N, D]`, of correctly classified training images.
    """

    prototypes: Prototypes
    gradients: jax.Array


def prototype_gradient(features: ArrayLike, prototypes: Prototypes) -> jax.Array:
    r"""Gradient of a nearest-mean classifier's loss with respect to the foreign prototype.

    .. math:: g = q_o \frac{h - P_o}{\|h - P_o\|}, \quad
        q = softmax(-\|h - P_1\|, \ldots, -\|h - P_K\|, -\|h - P_o\|)

    It is the same whichever class is the label. Zero at the foreign prototype itself.

    Args:
        features: `[B, D]`.
        prototypes: of training features.

    Returns:
        `[B, D]`, nats per unit of feature.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.
    """
    h, (classes, foreign) = as_fitted_features(features, prototypes)
    check_width(h, len(foreign))
    # Distances do not depend on the origin; about the foreign prototype squares keep their digits.
    h, classes = h - foreign[None], classes - foreign[None]
    length = jnp.sqrt(squared_norm(h))[:, None]
    squares = length**2 - 2 * project(h, classes.T) + squared_norm(classes)[None]
    distances = jnp.concatenate([jnp.sqrt(jnp.maximum(squares, 0.0)), length], axis=1)
    return jax.nn.softmax(-distances)[:, -1:] * divide_or_zero(h, length)


def grood(features: ArrayLike, bank: GroodBank) -> jax.Array:
    r"""Negative squared distance to the nearest gradient of a training image.

    .. math:: S = -\min_i \|g(h) - g_i\|_2^2

    Costs a product with `[D, N]` for the N gradients of the bank.

    Args:
        features: `[B, D]`.
        bank: of training images, from `statistics.prototypes.grood_bank`.

    Returns:
        `[B]`, squared nats per unit of feature, at most zero; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        ElAraby, Sahoo, Pereira, Novello, Paull (2025), "GROOD: GRadient-aware Out-Of-Distribution
        detection", https://arxiv.org/abs/2312.14427. Differs from its code in OpenOOD: that takes
        real OOD images of a validation set for the foreign prototype by default, which this never
        does unless you give them; and searches neighbours approximately, this exactly.
    """
    h, (prototypes, gradients) = as_fitted_features(features, bank)
    gradient = prototype_gradient(h, prototypes)
    products = project(gradient, gradients.T)
    nearest = (squared_norm(gradients)[None] - 2 * products).argmin(axis=-1)
    # Found by products, which cancel near zero; measured by the difference, which does not.
    return -squared_norm(gradient - gradients[nearest])
