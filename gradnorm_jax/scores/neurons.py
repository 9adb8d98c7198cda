"""Scores that look at gradients feature by feature: NAC and gradient short-circuits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.losses import softmax_minus_uniform
from gradnorm_jax.scores.arrays import as_outputs, check_width, project
from gradnorm_jax.scores.curvature import logits_and_kernel
from gradnorm_jax.scores.output import energy


class NeuronCoverage(NamedTuple):
    """How usual each state of each feature is among training images.

    Attributes:
        edges: `[M + 1]`, increasing, of the bins of states.
        coverage: `[D, M]`, in [0, 1], 1 for the usual.
        steepness: `[]`, of the sigmoid that makes states.
    """

    edges: jax.Array
    coverage: jax.Array
    steepness: jax.Array


def nac(
    features: ArrayLike, logits: ArrayLike, kernel: ArrayLike, coverage: NeuronCoverage
) -> jax.Array:
    r"""NAC-UE of the last layer's input: how many features are in a usual state.

    .. math:: S = \frac{1}{D} \sum_i \Phi_i(\sigma(\alpha \, h_i \, (W (p - u))_i)),
        \quad W (p - u) = \partial KL(u \| p) / \partial h

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        kernel: `[D, C]`, of the last layer.
        coverage: of training images, from `statistics.neuron_counts.neuron_coverage`.

    Returns:
        `[B]`, fractions of the features in [0, 1]; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Liu, Tian, Li et al. (2024), "Neuron Activation Coverage: Rethinking Out-of-distribution
        Detection and Generalization". https://arxiv.org/abs/2306.02879. The paper's results add
        inner layers; this is the last one alone, in the bins of the authors' code. They count
        images to tell what is usual, this takes fractions of them. Other code under this name
        (pytorch-ood) has other bins, and adds layers up.
    """
    z, weights = logits_and_kernel(logits, kernel)
    h, z, weights, (edges, usual, steepness) = as_outputs(features, z, weights, coverage)
    check_width(h, len(weights))
    check_width(h, len(usual))
    gradient = project(softmax_minus_uniform(z), weights.T)
    states = jax.nn.sigmoid(steepness * h * gradient)
    num_features, num_bins = usual.shape
    bins = jnp.searchsorted(edges, states, side="right") - 1
    first = jnp.arange(num_features, dtype=bins.dtype)[None] * num_bins
    return usual.reshape(-1)[first + bins.clip(0, num_bins - 1)].mean(axis=-1)


def gsc(
    features: ArrayLike, logits: ArrayLike, kernel: ArrayLike, *, fraction: float = 0.05
) -> jax.Array:
    r"""Gradient short-circuit at the last layer: energy without the features that decide most.

    .. math:: S = \log \sum_c e^{z'_c}, \quad z' = z - W^T (m \odot h)

    where the mask m takes out the features with the largest absolute derivatives of the largest
    logit, abs(d z_y / d h) = abs(w_y). The last layer is linear, so the paper's first-order step is
    exact. Experimental: the paper acts on an inner layer, has no public code, and we could not read
    how many features it takes out.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        kernel: `[D, C]`, of the last layer.
        fraction: of the features, rounded up, to take out; equal derivatives go together.

    Returns:
        `[B]` in the units of the logits; higher is more in-distribution.

    Raises:
        ValueError: the fraction is not in [0, 1], or a shape is not as above.

    References:
        Gu, Qiao, Li (2025), "Gradient Short-Circuit: Efficient Out-of-Distribution Detection via
        Feature Intervention". https://arxiv.org/abs/2507.01417
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    h, z, weights = as_outputs(features, *logits_and_kernel(logits, kernel))
    check_width(h, len(weights))
    count = math.ceil(fraction * len(weights))
    if not count:
        return energy(z)
    sizes = jnp.abs(weights.T[z.argmax(axis=-1)])
    largest, _ = jax.lax.top_k(sizes, count)
    removed = jnp.where(sizes >= largest[:, -1:], h, jnp.zeros_like(h))
    return energy(z - project(removed, weights))
