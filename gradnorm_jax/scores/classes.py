"""Scores by where a feature lies among the classes of the last layer."""

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, divide_or_zero, to_common_float


def she(features: ArrayLike, logits: ArrayLike, patterns: ArrayLike) -> jax.Array:
    """Simplified Hopfield energy: inner product with the predicted class's pattern.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        patterns: `[C, D]`, the mean feature of the training images of each class that are
            classified correctly.

    Returns:
        `[B]` in squared units of the features; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Zhang et al. (2023), "Out-of-Distribution Detection based on In-Distribution Data Patterns
        Memorization with Modern Hopfield Energy".
    """
    rows, logits, patterns = _as_common(features, logits, jnp.asarray(patterns))
    return (rows * patterns[logits.argmax(axis=1)]).sum(axis=1)


def fdbd(features: ArrayLike, logits: ArrayLike, kernel: ArrayLike, mean: ArrayLike) -> jax.Array:
    r"""Mean distance to the other classes' decision boundaries, over that from the mean.

    .. math:: S = \frac{1}{C - 1} \sum_{c \ne \hat y}
       \frac{|z_{\hat y} - z_c|}{\|w_{\hat y} - w_c\| \, \|h - \mu\|}

    Classes with the same weights have no boundary between them, and count as zero.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`, of two classes at least.
        kernel: `[D, C]`, the last layer's.
        mean: `[D]` of training features.

    Returns:
        `[B]`, at least zero; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Liu, Qin (2024), "Fast Decision Boundary based Out-of-Distribution Detector".
        https://arxiv.org/abs/2312.11536
    """
    rows, logits, weights, mean = _as_common(features, logits, jnp.asarray(kernel).T, mean)
    predicted = logits.argmax(axis=1)
    own = weights[predicted]
    squared = (weights**2).sum(axis=1)
    products = jnp.matmul(own, weights.T, precision=jax.lax.Precision.HIGHEST)
    sizes = squared[predicted][:, None] + squared[None]
    between = sizes - 2 * products
    # What the difference rounds to where the weights are the same, the class's own included.
    is_same = between <= 8 * jnp.finfo(rows.dtype).eps * sizes
    between = jnp.where(is_same, jnp.zeros_like(between), between)
    gaps = logits.max(axis=1, keepdims=True) - logits
    distances = divide_or_zero(gaps, jnp.sqrt(between)).sum(axis=1) / (logits.shape[1] - 1)
    return divide_or_zero(distances, jnp.linalg.norm(rows - mean[None], axis=1))


def nci(
    features: ArrayLike,
    logits: ArrayLike,
    kernel: ArrayLike,
    mean: ArrayLike,
    *,
    alpha: float = 1e-4,
) -> jax.Array:
    r"""Closeness to the predicted class's weights, plus the size of the feature.

    .. math:: S = w_{\hat y}^T (h - \mu) / \|h - \mu\|_2 + \alpha \|h\|_1

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        kernel: `[D, C]`, the last layer's.
        mean: `[D]` of training features.
        alpha: weight of the second term, the factor U of GradNorm; at least zero.

    Returns:
        `[B]`; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Liu, Qin (2025), "Detecting Out-of-Distribution through the Lens of Neural Collapse".
        https://arxiv.org/abs/2311.01479
    """
    rows, logits, weights, mean = _as_common(features, logits, jnp.asarray(kernel).T, mean)
    centred = rows - mean[None]
    along = (weights[logits.argmax(axis=1)] * centred).sum(axis=1)
    size = alpha * jnp.abs(rows).sum(axis=1)
    return divide_or_zero(along, jnp.linalg.norm(centred, axis=1)) + size


def cadref(
    features: ArrayLike,
    logits: ArrayLike,
    kernel: ArrayLike,
    means: ArrayLike,
    logit_score: ArrayLike,
    mean_logit_score: ArrayLike,
) -> jax.Array:
    r"""Relative distance from the predicted class's mean feature, in two parts.

    .. math:: S = -\Big( \frac{e^+}{s(z)} + \frac{e^-}{E[s]} \Big), \quad
       e^\pm = \frac{\| \max(\pm (h - m_{\hat y}) \, sign(w_{\hat y}), 0) \|_1}{\|h\|_1}

    Args:
        features: `[B, D]`. Zeros are divided by one.
        logits: `[B, C]`.
        kernel: `[D, C]`, the last layer's.
        means: `[C, D]`, the mean feature of the training images that are predicted as each class.
        logit_score: `[B]`, a score s of the logits that is positive, such as `energy` mostly is.
        mean_logit_score: its mean over training images.

    Returns:
        `[B]`; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Ling et al. (2025), "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled
        Relative Feature Leveraging", CVPR.
    """
    rows, logits, weights, means = _as_common(features, logits, jnp.asarray(kernel).T, means)
    score, mean_score, size = to_common_float(
        logit_score, mean_logit_score, jnp.abs(rows).sum(axis=1)
    )
    predicted = logits.argmax(axis=1)
    signed = (rows - means[predicted]) * jnp.sign(weights[predicted])
    size = jnp.where(size == 0, jnp.ones_like(size), size)
    positive = jnp.maximum(signed, 0).sum(axis=1) / size
    negative = jnp.maximum(-signed, 0).sum(axis=1) / size
    return -(positive / score + negative / mean_score)


def _as_common(
    features: ArrayLike, logits: ArrayLike, weights: jax.Array, *more: ArrayLike
) -> tuple[jax.Array, ...]:
    """All in one type; ValueError unless features `[B, D]`, logits `[B, C]`, weights `[C, D]`."""
    rows, logits = as_rows("features", features, "D"), as_rows("logits", logits, "C")
    if len(rows) != len(logits) or weights.shape != (logits.shape[1], rows.shape[1]):
        raise ValueError(
            f"features of shape {rows.shape} and logits of shape {logits.shape} do not go with "
            f"{weights.shape} weights or means of classes: they must be [B, D], [B, C] and [C, D]"
        )
    return to_common_float(rows, logits, weights, *more)
