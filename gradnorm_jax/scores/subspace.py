"""Scores by how much of a feature lies where training features do not vary."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, divide_or_zero, to_common_float
from gradnorm_jax.scores.arrays import check_width
from gradnorm_jax.scores.output import energy, max_logit


class Residual(NamedTuple):
    """The directions in which training features vary least.

    Attributes:
        origin: `[D]`, from where features are seen; where the last layer's logits are all zero.
        directions: `[D, R]`, orthonormal.
    """

    origin: Any
    directions: Any


class Principal(NamedTuple):
    """The directions in which standardised training features vary most.

    Attributes:
        mean: `[D]` of training features.
        scale: `[D]`, their standard deviations; 1 where they do not vary.
        directions: `[D, R]`, orthonormal, of the features after both.
    """

    mean: Any
    scale: Any
    directions: Any


def residual(features: ArrayLike, space: Residual) -> jax.Array:
    r"""Negative length of the part in the residual space.

    .. math:: S = -\| N^T (h - o) \|_2

    Args:
        features: `[B, D]`.
        space: of training features, from `statistics.subspaces.residual_space`.

    Returns:
        `[B]` in units of the features, at most zero; higher is more in-distribution.

    Raises:
        ValueError: the features are not `[B, D]` with the D of the space.

    References:
        Wang, Li, Feng, Zhang (2022), "ViM: Out-Of-Distribution with Virtual-logit Matching".
        https://arxiv.org/abs/2203.10807
    """
    return -_length(features, space.origin, space.directions)


def vim(features: ArrayLike, logits: ArrayLike, space: Residual, alpha: ArrayLike) -> jax.Array:
    r"""Virtual-logit matching: energy minus the residual as one more logit.

    .. math:: S = L(z) - \alpha \| N^T (h - o) \|_2

    a monotone function of the softmax probability of the virtual logit, which the paper takes.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        space: as for `residual`.
        alpha: what makes the residual of training features as large on average as their largest
            logit.

    Returns:
        `[B]` in units of the logits; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Wang, Li, Feng, Zhang (2022), in the form of their code.
        https://arxiv.org/abs/2203.10807
    """
    scores, alpha, rest = to_common_float(energy(logits), alpha, residual(features, space))
    return scores + alpha * rest


def neco(
    features: ArrayLike, logits: ArrayLike, space: Principal, *, use_max_logit: bool = False
) -> jax.Array:
    r"""The share of a feature that lies in the principal space of training features.

    .. math:: S = \| P^T s \|_2 / \| s \|_2, \quad s = (h - \mu) / \sigma

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        space: of training features, from `statistics.subspaces.principal_space`.
        use_max_logit: multiply by the largest logit, as the paper does for all but ResNets.

    Returns:
        `[B]`, in [0, 1] unless multiplied; higher is more in-distribution. Features at the mean
        give zero.

    Raises:
        ValueError: a shape is not as above.

    References:
        Ben Ammar et al. (2024), "NECO: NEural Collapse Based Out-of-distribution detection".
        Public copies of its script differ in what they divide by: h or s.
        https://arxiv.org/abs/2310.06823
    """
    rows, largest, mean, scale, directions = to_common_float(
        as_rows("features", features, "D"), max_logit(logits), *space
    )
    check_width(rows, len(mean))
    standardised = (rows - mean[None]) / scale[None]
    inside = jnp.matmul(standardised, directions, precision=jax.lax.Precision.HIGHEST)
    share = divide_or_zero(jnp.linalg.norm(inside, axis=1), jnp.linalg.norm(standardised, axis=1))
    return share * largest if use_max_logit else share


def _length(features: ArrayLike, origin: ArrayLike, directions: ArrayLike) -> jax.Array:
    rows, origin, directions = to_common_float(
        as_rows("features", features, "D"), origin, directions
    )
    check_width(rows, len(origin))
    inside = jnp.matmul(rows - origin[None], directions, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.norm(inside, axis=1)
