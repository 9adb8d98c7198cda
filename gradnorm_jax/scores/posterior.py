"""Scores of one image's last-layer gradients against the curvature that training images give.

An appended 1 in the features h is what the bias adds; the arrays that are fitted have D + 1 rows
where it is included.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import unit_rows
from gradnorm_jax.scores.arrays import (
    append_one,
    as_fitted_features,
    as_matrix,
    as_outputs,
    project,
    softmax_minus_prediction,
    squared_norm,
)


class HeadFisher(NamedTuple):
    """The last layer's Fisher information as a Kronecker product, by roots of its inverse.

    Attributes:
        feature_root: `[D (+ 1), R]`, R R^T the inverse of the features' second moment A.
        output_root: `[C, Q]`, Q Q^T the inverse of the softmax's mean covariance B.
    """

    feature_root: jax.Array
    output_root: jax.Array


def fisher_mahalanobis(features: ArrayLike, logits: ArrayLike, fisher: HeadFisher) -> jax.Array:
    r"""Negative squared length of the predicted label's gradient, in the Fisher metric.

    .. math:: S = -g^T (A \otimes B)^{-1} g = -(h^T A^{-1} h) \, (\delta^T B^{-1} \delta),
        \quad g = h \delta^T, \; \delta = p - e_{\hat y}

    with A = E[h h^T], B = E[diag p - p p^T] over training images. It is how much the image would
    move the loss of its own predicted label if it were trained on: its self-influence.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        fisher: of training images, from `statistics.output_fisher.head_fisher`.

    Returns:
        `[B]`, nats, at most zero; higher is more in-distribution. It grows with the number of
        classes and features, as squared Mahalanobis distances do.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Martens, Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature" for the metric, https://arxiv.org/abs/1503.05671; Madras, Atwood, D'Amour (2019),
        "Detecting Extrapolation with Local Ensembles" for such scores,
        https://arxiv.org/abs/1910.09573. The two together are ours.
    """
    h, z, (feature_root, output_root) = as_outputs(features, logits, fisher)
    leverage = squared_norm(project(h, feature_root))
    return -leverage * squared_norm(project(softmax_minus_prediction(z), output_root))


def scod(features: ArrayLike, posterior_root: ArrayLike) -> jax.Array:
    r"""Negative predictive variance of the logits under a Gaussian posterior of the last layer.

    .. math:: S = -tr(J \Sigma J^T) = -C \sigma^2 \Big(\|h\|^2
        - \sum_j \frac{\lambda_j}{\lambda_j + 1 / (2 \sigma^2)} (q_j^T h)^2\Big)

    with J = dz / d(W, b) and the pairs (lambda_j, q_j) of E = sum_i h_i h_i^T over training images:
    for an identity likelihood the Gauss-Newton matrix is E for each class, so what the papers
    sketch has a closed form in the last layer.

    Args:
        features: `[B, D]`.
        posterior_root: `[D (+ 1), R]`, a root of C Sigma, from
            `statistics.directions.posterior_root`.

    Returns:
        `[B]`, squared logits, at most zero; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Sharma, Azizan, Pavone (2021), https://arxiv.org/abs/2102.12567 (SCOD); Miani, Beretta,
        Hauberg (2024), "Sketched Lanczos uncertainty score", https://arxiv.org/abs/2409.15008
        (SLU). Both sketch the whole network, as `scod_of_parameters` can; this is exact, and of
        the last layer alone. The scale is SLU's.
    """
    h, root = as_fitted_features(
        features, as_matrix("posterior_root", posterior_root, "D (+ 1), R")
    )
    return -squared_norm(project(h, root))


class Leverage(NamedTuple):
    """Where training features lie, for the leverage of a new one.

    Attributes:
        whitening: `[D + 1, R]`, whitening @ whitening.T the pseudo-inverse of X^T X.
        complement: `[D + 1, D + 1 - R]`, orthonormal, what no training image reaches.
    """

    whitening: jax.Array
    complement: jax.Array


def pnml(features: ArrayLike, kernel: ArrayLike, bias: ArrayLike, leverage: Leverage) -> jax.Array:
    r"""Negative regret of the predictive normalised maximum likelihood learner for the last layer.

    .. math:: S = -\frac{1}{\log C} \log \sum_c \frac{p_c}{p_c + (1 - p_c) p_c^{\kappa}},
        \quad \kappa = \max\Big(\|x_\perp\|^2, \frac{q}{1 + q}\Big), \; q = x^T (X^T X)^+ x

    Features have unit length here, x with an appended 1 that is not scaled, and p is that of the
    last layer for the feature of unit length.

    Args:
        features: `[B, D]`.
        kernel: `[D, C]`, of the last layer.
        bias: `[C]`.
        leverage: of training features of unit length, from `statistics.directions.unit_leverage`.

    Returns:
        `[B]`, fractions of log C nats in [-1, 0]; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Bibas, Feder, Hassner (2021), "Single Layer Predictive Normalized Maximum Likelihood for
        Out-of-Distribution Detection". https://arxiv.org/abs/2110.09246. As in the authors'
        `score_utils.py`. Their README and pytorch-ood take q / (1 + q) alone, and append no 1: no
        difference between the first two unless X^T X is singular.
    """
    weights = as_matrix("kernel", kernel, "D, C")
    h, weights, shift, (whitening, complement) = as_fitted_features(
        features, weights, bias, leverage
    )
    unit = unit_rows(h)
    log_p = jax.nn.log_softmax(project(unit, weights) + shift[None])
    x = append_one(unit)
    inside, outside = squared_norm(project(x, whitening)), squared_norm(project(x, complement))
    kappa = jnp.maximum(outside, inside / (1 + inside))[:, None]
    # p / (p + (1 - p) p^kappa), by logarithms: no power of a p that underflows.
    genie = jax.nn.sigmoid((1 - kappa) * log_p - jnp.log1p(-jnp.exp(log_p)))
    return -jnp.log(genie.sum(axis=-1)) / math.log(weights.shape[1])
