"""Mahalanobis distances in several layers, after steps of the input: the paper's baseline."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax.numerics import check_step, to_common_float
from gradnorm_jax.scores.arrays import project
from gradnorm_jax.scores.feature import TiedGaussians, mahalanobis
from gradnorm_jax.scores.inner import Layers, layer_features, parts
from gradnorm_jax.scores.perturbation import input_gradient
from gradnorm_jax.types import Model

MAGNITUDES = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01)
"""Those that the paper chooses from, for pixels from -1 to 1."""


class LayerRegression(NamedTuple):
    """Gaussians of layers, and how their distances tell training images from attacked ones.

    Attributes:
        gaussians: of each layer's features.
        weights: `[L]`, of the distances.
        bias: `[]`.
    """

    gaussians: tuple[TiedGaussians, ...]
    weights: jax.Array
    bias: jax.Array


def layer_distances(
    model: Model,
    images: jax.Array,
    gaussians: Sequence[TiedGaussians],
    *,
    layers: Layers = 5,
    magnitude: float = 0.0,
) -> jax.Array:
    r"""Negative squared Mahalanobis distances in layers, each after a step that lowers its own.

    .. math:: M_l(\hat x_l), \quad M_l(x) = -\min_c (f_l(x) - \mu_{l,c})^T \Sigma_l^{-1} (f_l(x) -
        \mu_{l,c}), \quad \hat x_l = x + \epsilon \, sign(\partial M_l(x) / \partial x)

    where sign(0) is -1. For each layer it costs a pass forward and back up to it, and one forward:
    at most about four forward passes a layer, and only a single one for all where epsilon is zero.

    Args:
        model: the network, whose activations have their channels last.
        images: `[B, ...]`.
        gaussians: of each layer's features, averaged over positions.
        layers: which.
        magnitude: epsilon >= 0, in the units of `images`.

    Returns:
        `[B, L]`, at most zero.

    Raises:
        ValueError: the magnitude is out of range, or there are not as many layers as Gaussians.
    """
    check_step(magnitude)
    names = parts(model, images, layers)

    def distance(name: str, fitted: TiedGaussians, images: jax.Array) -> jax.Array:
        return mahalanobis(layer_features(model, images, (name,))[name], fitted)

    if not magnitude:
        found = layer_features(model, images, names)
        pairs = zip(names, gaussians, strict=True)
        return jnp.stack([mahalanobis(found[n], each) for n, each in pairs], axis=1)
    rows = []
    for name, each in zip(names, gaussians, strict=True):
        _, gradient = input_gradient(functools.partial(distance, name, each), images)
        step = jnp.where(gradient > 0, magnitude, -magnitude).astype(images.dtype)
        rows.append(distance(name, each, images + step))
    return jnp.stack(rows, axis=1)


def attacked(model: Model, images: jax.Array, *, noise: float = 0.05) -> jax.Array:
    """The images after a step up their own loss: x + noise sign(d/dx [-log max_c p_c]).

    The authors step by the loss of the label, and then clip to [0, 1] what lies in [-1, 1], which
    this does not: half of the clipped pixels would be black, attacked or not.
    """

    def loss(x: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(model(x).logits).max(axis=-1)

    _, gradient = input_gradient(loss, images)
    return images + jnp.where(gradient >= 0, noise, -noise).astype(images.dtype)


def mahalanobis_layers(distances: jax.Array, fitted: LayerRegression) -> jax.Array:
    """Log odds that an image is no attacked one, by logistic regression on its distances.

    Args:
        distances: `[B, L]`, from `layer_distances`.
        fitted: to training images and attacked ones, from `statistics.regression`.

    Returns:
        `[B]` in nats; higher is more in-distribution. The authors take the probability, in whose
        rounding clear cases become ties.

    References:
        Lee, Lee, Lee, Shin (2018), section 2.2. https://arxiv.org/abs/1807.03888
        Huang, Geng, Li (2021), appendix, for five layers of BiT and these steps.
        https://arxiv.org/abs/2110.00218
    """
    rows, weights, bias = to_common_float(distances, fitted.weights, fitted.bias)
    return project(rows, weights[:, None])[:, 0] + bias
