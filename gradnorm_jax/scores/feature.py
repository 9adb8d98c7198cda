"""Scores of the features, by distances to what training images of each class look like."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows


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
