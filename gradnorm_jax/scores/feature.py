"""Scores of the features, by distances to what training images of each class look like."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, to_common_float


class TiedGaussians(NamedTuple):
    """One Gaussian per class, all with the same covariance, in whitened coordinates.

    Attributes:
        centre: `[D]`, the mean of all features, taken off before whitening to keep digits.
        whitening: `[D, R]` with whitening @ whitening.T the pseudo-inverse of the covariance.
        means: `[K, R]`, whitened means of the K classes that have images.
    """

    centre: jax.Array
    whitening: jax.Array
    means: jax.Array


class DiagonalGaussian(NamedTuple):
    """A Gaussian of independent features.

    Attributes:
        mean: `[D]`.
        deviation: `[D]`, standard deviations, zero where a feature does not vary.
    """

    mean: jax.Array
    deviation: jax.Array


def gaussian(features: ArrayLike, fitted: DiagonalGaussian) -> jax.Array:
    r"""Log density of a Gaussian of independent features.

    .. math:: S = \sum_i \log N(h_i; \mu_i, \sigma_i^2)

    Features that do not vary among training images are left out.

    Args:
        features: `[B, D]`.
        fitted: to training features, from `statistics.moments.diagonal_gaussian`.

    Returns:
        `[B]` in nats; higher is more in-distribution.

    Raises:
        ValueError: the features are not `[B, D]` with the D of the Gaussian.

    References:
        Dauncey et al. (2024), "Approximations to the Fisher Information Metric of Deep Generative
        Models for Out-Of-Distribution Detection", for logarithms of the gradient's norms, layer by
        layer. https://arxiv.org/abs/2403.01485
    """
    rows, mean, deviation = to_common_float(as_rows("features", features, "D"), *fitted)
    if rows.shape[1:] != mean.shape:
        raise ValueError(
            f"features have {rows.shape[1]} entries, but the Gaussian was fitted to "
            f"{mean.shape[0]}: fit it to features of the same network"
        )
    varies = deviation > 0
    scale = jnp.where(varies, deviation, jnp.ones_like(deviation))
    density = jax.scipy.stats.norm.logpdf(rows, mean[None], scale[None])
    return jnp.where(varies[None], density, jnp.zeros_like(density)).sum(axis=1)


def mahalanobis(features: ArrayLike, gaussians: TiedGaussians) -> jax.Array:
    r"""Negative squared Mahalanobis distance to the nearest class mean.

    .. math:: S = -\min_c (h - \mu_c)^T \Sigma^{-1} (h - \mu_c)

    Args:
        features: `[B, D]`.
        gaussians: of training features, from `tied_gaussians`.

    Returns:
        `[B]`, at most zero; higher is more in-distribution.

    Raises:
        ValueError: the features are not `[B, D]` with the D of the Gaussians.

    References:
        Lee, Lee, Lee, Shin (2018), "A Simple Unified Framework for Detecting Out-of-Distribution
        Samples and Adversarial Attacks", equation 2, for the penultimate layer alone.
        https://arxiv.org/abs/1807.03888
    """
    precise = jax.lax.Precision.HIGHEST
    centre, whitening, means = gaussians
    rows = as_rows("features", features, "D")
    if rows.shape[1:] != centre.shape:
        raise ValueError(
            f"features have {rows.shape[1]} entries, but the Gaussians were fitted to "
            f"{centre.shape[0]}: fit them to features of the same network"
        )
    centred = rows.astype(centre.dtype) - centre[None]
    whitened = jnp.matmul(centred, whitening, precision=precise)
    squared = (
        (whitened**2).sum(axis=-1, keepdims=True)
        - 2 * jnp.matmul(whitened, means.T, precision=precise)
        + (means**2).sum(axis=-1)[None]
    )
    return -jnp.maximum(squared.min(axis=-1), 0.0)


def relative_mahalanobis(
    features: ArrayLike, gaussians: TiedGaussians, background: TiedGaussians
) -> jax.Array:
    r"""Squared Mahalanobis distance to all training features minus that to the nearest class.

    .. math:: S = (h - \mu)^T \Sigma_0^{-1} (h - \mu) - \min_c (h - \mu_c)^T \Sigma^{-1} (h - \mu_c)

    Args:
        features: `[B, D]`.
        gaussians: of training features, from `tied_gaussians`.
        background: the one Gaussian of all of them, from `background_gaussian`.

    Returns:
        `[B]`; higher is more in-distribution.

    Raises:
        ValueError: the features are not `[B, D]` with the D of the Gaussians.

    References:
        Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan (2021), "A Simple Fix to Mahalanobis Distance
        for Improving Near-OOD Detection". https://arxiv.org/abs/2106.09022
    """
    return mahalanobis(features, gaussians) - mahalanobis(features, background)
