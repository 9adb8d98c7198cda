"""Rectified features: what keeps OOD images from exciting the last layer as ID images do.

All are functions of features `[B, D]`; the logits that go with them are the last layer's, of these:
`outputs_of`.
"""

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, check_fraction, divide_or_zero, to_common_float
from gradnorm_jax.types import Outputs


def outputs_of(features: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None = None) -> Outputs:
    """Features `[B, D]` with the logits `features @ kernel + bias` `[B, C]`, in full precision.

    Args:
        features: `[B, D]`.
        kernel: `[D, C]`.
        bias: `[C]`; none if None.
    """
    rows, kernel = to_common_float(as_rows("features", features, "D"), kernel)
    logits = jnp.matmul(rows, kernel, precision=jax.lax.Precision.HIGHEST)
    return Outputs(rows, logits if bias is None else logits + jnp.asarray(bias, rows.dtype)[None])


def react(features: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """Features cut off at a threshold: min(h, c).

    References:
        Sun, Guo, Li (2021), "ReAct: Out-of-distribution Detection With Rectified Activations".
        https://arxiv.org/abs/2111.12797
    """
    rows, threshold = to_common_float(as_rows("features", features, "D"), threshold)
    return jnp.minimum(rows, threshold)


def vra(
    features: ArrayLike, lower: ArrayLike, upper: ArrayLike, *, gamma: float = 0.0
) -> jax.Array:
    """Features below `lower` become zero, above `upper` these, and between them gamma is added.

    Public code of that name in OpenOOD and pytorch-ood raises small features *to* the lower
    threshold instead of taking them to zero, with a threshold for each feature.

    References:
        Xu et al. (2023), "VRA: Variational Rectified Activation for Out-of-distribution Detection",
        VRA, and VRA+ where gamma > 0. https://arxiv.org/abs/2302.11716
    """
    rows, lower, upper = to_common_float(as_rows("features", features, "D"), lower, upper)
    inside = jnp.where(rows > upper, upper, rows + gamma)
    return jnp.where(rows < lower, jnp.zeros_like(rows), inside)


def ash_p(features: ArrayLike, *, sparsity: float = 0.6) -> jax.Array:
    """Features of which a fraction, the smallest of each image, become zero.

    References:
        Djurisic et al. (2023), "Extremely Simple Activation Shaping for Out-of-Distribution
        Detection". https://arxiv.org/abs/2209.09858
    """
    rows = as_rows("features", features, "D")
    return jnp.where(_kept(rows, sparsity), rows, jnp.zeros_like(rows))


def ash_b(features: ArrayLike, *, sparsity: float = 0.65) -> jax.Array:
    """The same, with all that is kept of an image replaced by one number of the same sum.

    Only positive features are summed, which is all of them after a ReLU.

    References:
        Djurisic et al. (2023). https://arxiv.org/abs/2209.09858
    """
    rows = as_rows("features", features, "D")
    kept = _kept(rows, sparsity)
    fill = _positive_sum(rows) / kept.sum(axis=1, keepdims=True).astype(rows.dtype)
    return jnp.where(kept, fill, jnp.zeros_like(rows))


def ash_s(features: ArrayLike, *, sparsity: float = 0.9) -> jax.Array:
    """The features of `ash_p`, times exp(sum before / sum after).

    References:
        Djurisic et al. (2023). https://arxiv.org/abs/2209.09858
    """
    pruned = ash_p(features, sparsity=sparsity)
    return pruned * _sharpening(as_rows("features", features, "D"), pruned)


def scale(features: ArrayLike, *, sparsity: float = 0.85) -> jax.Array:
    """All features, times the factor of `ash_s`.

    References:
        Xu, Chen, Franchi, Yao (2024), "Scaling for Training Time and Post-hoc Out-of-distribution
        Detection Enhancement". https://arxiv.org/abs/2310.00227
    """
    rows = as_rows("features", features, "D")
    return rows * _sharpening(rows, ash_p(rows, sparsity=sparsity))


def optfs(features: ArrayLike, theta: ArrayLike, left: ArrayLike, right: ArrayLike) -> jax.Array:
    """Features times a factor that depends on which of equal bins they fall in.

    Args:
        features: `[B, D]`.
        theta: `[bins]`, the factors.
        left: where the first bin begins.
        right: where the last ends. Beyond both, features become zero.

    References:
        Zhao et al. (2024), "Towards Optimal Feature-Shaping Methods for Out-of-Distribution
        Detection". https://arxiv.org/abs/2402.00865
    """
    rows, theta, left, right = to_common_float(
        as_rows("features", features, "D"), theta, left, right
    )
    bins = len(theta)
    position = jnp.floor(divide_or_zero(rows - left, right - left) * bins)
    inside = (rows >= left) & (rows < right)
    # A feature just below the right end may be rounded up to it.
    index = jnp.clip(position, 0, bins - 1).astype(jnp.int32)
    return rows * jnp.where(inside, theta[index], jnp.zeros_like(rows))


def _kept(rows: jax.Array, sparsity: float) -> jax.Array:
    """Which are the largest of each row, `[B, D]`, of equal ones the first."""
    check_fraction("sparsity", sparsity)
    size = rows.shape[1]
    count = size - round(size * sparsity)
    if count < 1:
        raise ValueError(f"sparsity={sparsity} leaves none of {size} features: choose less")
    _, largest = jax.lax.top_k(rows, count)
    return jnp.zeros(rows.shape, bool).at[jnp.arange(len(rows))[:, None], largest].set(True)


def _positive_sum(rows: jax.Array) -> jax.Array:
    return jnp.maximum(rows, 0).sum(axis=1, keepdims=True)


def _sharpening(rows: jax.Array, pruned: jax.Array) -> jax.Array:
    # Of positive features alone, whose largest are at least average: the ratio stays in bounds.
    return jnp.exp(divide_or_zero(_positive_sum(rows), _positive_sum(pruned)))
