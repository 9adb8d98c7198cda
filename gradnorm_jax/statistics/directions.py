"""Subspaces and metrics of the features that follow from their moments."""

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.gradient_subspace import Subspace
from gradnorm_jax.scores.posterior import Leverage
from gradnorm_jax.statistics.class_moments import ClassSums, class_means
from gradnorm_jax.statistics.moments import Moments, mean, principal_axes


def leading_directions(moments: Moments, share: float = 0.97) -> jax.Array:
    """The fewest directions `[D, K]` that hold `share` of the features' mean square, not centred.

    Raises:
        ValueError: there are no images, or all their features are zero.
    """
    mean(moments)
    values, vectors = principal_axes(moments.products)
    return jnp.asarray(vectors[:, : count_to_share(values, share)])


def principal_subspace(sums: ClassSums, share: float = 0.99) -> Subspace:
    """The fewest principal directions of the class means that hold `share` of their variance.

    Each class counts once; those without images are left out.

    Raises:
        ValueError: there are no labelled images, or all class means are the same.
    """
    means = class_means(sums)
    centre = means.mean(axis=0)
    _, values, directions = np.linalg.svd(means - centre, full_matrices=False)
    count = count_to_share(values**2, share)
    return Subspace(jnp.asarray(centre), jnp.asarray(directions[:count].T))


def posterior_root(
    moments: Moments,
    num_classes: int,
    *,
    rank: int | None = None,
    prior_std: float = 1.0,
    include_bias: bool = True,
) -> jax.Array:
    """A root of C times the posterior covariance of the last layer's weights for one class.

    The covariance is sigma^2 sum_j (1 - lambda_j / (lambda_j + 1 / (2 sigma^2))) q_j q_j^T over all
    directions, with the pairs (lambda_j, q_j) of sum_i h_i h_i^T.

    Args:
        moments: of training features.
        num_classes: C.
        rank: of how many directions the data count, as in a sketch, the other lambda_j being zero;
            None for all.
        prior_std: sigma, of each weight before data.
        include_bias: append the constant 1 by which a bias is multiplied.

    Raises:
        ValueError: there are no images.
    """
    mean(moments)
    products = with_one(moments) if include_bias else moments.products
    values, vectors = principal_axes(products)
    values = np.maximum(values, 0)
    values[len(values) if rank is None else rank :] = 0
    variances = num_classes / (2 * values + 1 / prior_std**2)
    # 1 - lambda / (lambda + 1 / (2 sigma^2)), times sigma^2, without the difference.
    return jnp.asarray(vectors * np.sqrt(variances))


def unit_leverage(moments: Moments) -> Leverage:
    """Where training features of length one lie, with an appended 1.

    Args:
        moments: of features of length one.

    Raises:
        ValueError: there are no images.
    """
    mean(moments)
    values, vectors = principal_axes(with_one(moments))
    kept = values > values[0] * len(values) * np.finfo(np.float64).eps
    whitening = vectors[:, kept] / np.sqrt(values[kept])
    return Leverage(jnp.asarray(whitening), jnp.asarray(vectors[:, ~kept]))


def with_one(moments: Moments) -> np.ndarray:
    """The sum of outer products of features with an appended 1, `[D + 1, D + 1]`."""
    column = moments.sum[:, None]
    return np.block([[moments.products, column], [column.T, moments.num_images]])


def count_to_share(values: np.ndarray, share: float) -> int:
    """How many of the values, which fall, it takes to sum to a share of the whole.

    Raises:
        ValueError: the share is not in (0, 1], or the values are all zero.
    """
    check_share(share)
    # What is but rounding beside the largest holds nothing.
    least = values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    cumulative = np.cumsum(np.where(values > least, values, 0))
    if not (len(cumulative) and cumulative[-1] > 0):
        raise ValueError(
            "training features do not vary where this detector looks: their class means are all "
            "the same, or all features are zero"
        )
    return int(np.searchsorted(cumulative / cumulative[-1], share)) + 1


def check_share(share: float) -> None:
    """Raises ValueError unless the share is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share!r}")
