"""Scores from first and second derivatives of the last layer's likelihood, in closed form.

With features h `[D]`, logits z = W^T h + b and p = softmax(z), the gradient of log p_y with respect
to W is h (e_y - p)^T, and an appended 1 in h is what the bias adds. So every norm below splits into
a factor of the features and one of the softmax, and costs a forward pass.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, to_common_float
from gradnorm_jax.scores.arrays import (
    as_matrix,
    as_outputs,
    project,
    softmax_minus_prediction,
    squared_norm,
)
from gradnorm_jax.scores.gradient import feature_norm, gradnorm


def gini(logits: ArrayLike, *, temperature: float = 1.0) -> jax.Array:
    r"""Negative Gini impurity of the softmax, the factor of ExGrad that the output contributes.

    .. math:: S = -\sum_c p_c (1 - p_c) = \|p\|_2^2 - 1

    Args:
        logits: `[B, C]`.
        temperature: T > 0 of the softmax.

    Returns:
        `[B]`, probabilities in [1/C - 1, 0], to full relative precision where p is nearly one-hot;
        higher is more in-distribution.

    Raises:
        ValueError: the temperature is not positive and finite, or the logits are not `[B, C]`.

    References:
        Igoe, Chung, Char, Schneider (2022), "How Useful are Gradients for OOD Detection Really?".
        https://arxiv.org/abs/2205.10439
    """
    # The absolute difference is p_c off the prediction and 1 - p_y at it: p (1 - p) either way.
    rows = as_rows("logits", logits, "C")
    weights = jnp.abs(softmax_minus_prediction(rows, temperature=temperature))
    return -(weights * (1 - weights)).sum(axis=-1)


def exgrad(
    features: ArrayLike,
    logits: ArrayLike,
    *,
    sign: Literal[1, -1],
    temperature: float = 1.0,
    include_bias: bool = True,
) -> jax.Array:
    r"""ExGrad: the expected 1-norm of the log likelihood's gradient, labels drawn from the softmax.

    .. math:: S = \pm E_{y \sim p} \|\partial \log p_y / \partial (W, b)\|_1
        = \pm 2 (\|h\|_1 + 1) \sum_c p_c (1 - p_c) / T

    Its factors pull apart: ||h||_1 tends to be larger in-distribution, the other to be smaller.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        sign: +1 if larger norms shall mean more in-distribution, -1 if smaller ones. The paper
            gives no direction and its public code takes, for each pair of test sets, the one whose
            AUROC is above one half: that cannot be known before the test, so it is yours to say.
        temperature: T > 0 of the softmax.
        include_bias: take the norm over the gradients of kernel and bias together, as that code.

    Returns:
        `[B]`, nats per unit of weight, >= 0 times `sign`.

    Raises:
        ValueError: the sign is neither, the temperature is out of range, or a shape is not as
            above.

    References:
        Igoe, Chung, Char, Schneider (2022), section 4. https://arxiv.org/abs/2205.10439
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    h, z = as_outputs(features, logits)
    norm = feature_norm(h, include_bias=include_bias)
    return -2 * sign * norm * gini(z, temperature=temperature) / temperature


def fisher_trace(features: ArrayLike, logits: ArrayLike, *, include_bias: bool = True) -> jax.Array:
    r"""Negative trace of the last layer's Fisher information at one image.

    .. math:: S = -E_{y \sim p} \|\partial \log p_y / \partial (W, b)\|_2^2
        = -(\|h\|_2^2 + 1) (1 - \|p\|_2^2)

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        include_bias: of the gradients of kernel and bias together.

    Returns:
        `[B]`, squared nats per unit of weight, at most zero; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Sharma, Azizan, Pavone (2021), "Sketching Curvature for Efficient Out-of-Distribution
        Detection for Deep Neural Networks", of the last layer and before any data are seen.
        https://arxiv.org/abs/2102.12567
    """
    h, z = as_outputs(features, logits)
    return (squared_norm(h) + float(include_bias)) * gini(z)


def grad_uncertainty(
    features: ArrayLike, logits: ArrayLike, *, include_bias: bool = True
) -> jax.Array:
    r"""Squared 2-norm of the last layer's gradient for a label that confounds all classes.

    .. math:: S = \Big\|\partial \Big(-\sum_c \log p_c\Big) / \partial (W, b)\Big\|_2^2
        = (\|h\|_2^2 + 1) \, \|C p - 1\|_2^2

    The square of C `gradnorm(ord=2, include_bias=True)`, so it ranks as that does. The paper trains
    a classifier on such squares of every layer, on labelled images of both kinds; this is the last
    layer's alone, and learns nothing.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        include_bias: take the norm over the gradients of kernel and bias together.

    Returns:
        `[B]`, squared nats per unit of weight, >= 0; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Lee, Prabhushankar, AlRegib (2023), "Probing the Purview of Neural Networks via Gradient
        Analysis". https://arxiv.org/abs/2304.02834
    """
    h, z = as_outputs(features, logits)
    norm = gradnorm(h, z, ord=2, include_bias=include_bias)
    return (z.shape[1] * norm) ** 2


def feature_hessian_trace(logits: ArrayLike, kernel: ArrayLike) -> jax.Array:
    r"""Negative trace of the loss's second derivative with respect to the features.

    .. math:: S = -tr \, \partial^2 (-\log p_y) / \partial h^2
        = \Big\|\sum_c p_c w_c\Big\|_2^2 - \sum_c p_c \|w_c\|_2^2

    It does not depend on the label y: the variance of the classes' weights under the softmax.

    Args:
        logits: `[B, C]`.
        kernel: `[D, C]`, the last layer's, whose columns are the w_c.

    Returns:
        `[B]`, nats per squared unit of feature, at most zero; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Park, Jung, Lee, Lee (2026), "Exploiting Local Flatness for Efficient Out-of-Distribution
        Detection" (Fold), without its partial normalisation of features, whose exact form we could
        not read. https://arxiv.org/abs/2606.29952
    """
    rows, weights = logits_and_kernel(logits, kernel)
    # About the predicted class's weights, so that all terms vanish as the prediction is certain.
    weights = weights - weights.mean(axis=1, keepdims=True)
    predicted = weights.T[rows.argmax(axis=-1)]
    residual = softmax_minus_prediction(rows)
    mean = project(residual, weights.T)
    squares = project(residual, squared_norm(weights.T)[:, None])[:, 0]
    return jnp.minimum(squared_norm(mean) + 2 * (predicted * mean).sum(axis=-1) - squares, 0.0)


def logits_and_kernel(logits: ArrayLike, kernel: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Logits `[B, C]` and the kernel `[D, C]` that they are of, of one floating type.

    Raises:
        ValueError: they are not of equally many classes.
    """
    rows, weights = as_rows("logits", logits, "C"), as_matrix("kernel", kernel, "D, C")
    if rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"logits [B, C] and kernel [D, C] must be of the same classes, got shapes {rows.shape} "
            f"and {weights.shape}"
        )
    rows, weights = to_common_float(rows, weights)
    return rows, weights
