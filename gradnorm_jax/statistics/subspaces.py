"""Directions in which training features vary least or most."""

import functools
from typing import NamedTuple

import numpy as np

from gradnorm_jax.scores.subspace import Principal, Residual
from gradnorm_jax.statistics.moments import MOMENTS, Moments, covariance, mean, principal_axes
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class VirtualLogits(NamedTuple):
    """What makes residuals as large as logits.

    Attributes:
        space: in float64.
        max_logits: `[]`, sum of the largest logit over images.
        residuals: `[]`, sum of the lengths in the residual space.
    """

    space: Residual
    max_logits: np.ndarray
    residuals: np.ndarray


def residual_space(moments: Moments, head: LinearHead, dim: int | None = None) -> Residual:
    """All but the `dim` directions in which features vary most about the origin of the logits.

    The origin o = -pinv(W^T) b is where the logits are zero, or as near to it as can be.

    Args:
        moments: of the features.
        head: the last layer, in float64 NumPy.
        dim: by default the paper's: 1000 of at least 2048 features, 512 of at least 768, and half
            of fewer.

    Raises:
        ValueError: there are no features, or dim leaves none of their directions or all.
    """
    size = len(head.kernel)
    if dim is None:
        dim = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    if not 0 < dim < size:
        raise ValueError(f"dim must lie between 0 and the {size} features, got {dim}")
    origin = -np.linalg.pinv(head.kernel.T) @ head.bias
    offset = mean(moments) - origin
    _, directions = principal_axes(covariance(moments) + np.outer(offset, offset))
    return Residual(origin, directions[:, dim:])


def principal_space(moments: Moments, dim: int | None = None) -> Principal:
    """The `dim` directions in which standardised features vary most.

    Args:
        moments: of the features.
        dim: by default as many as hold 90 % of the variance.

    Raises:
        ValueError: there are no features, they do not vary, or they are fewer than dim.
    """
    centre, products = mean(moments), covariance(moments)
    variances = products.diagonal()
    # What the difference of sums in a covariance rounds to is no variance.
    second = moments.products.diagonal() / moments.num_images
    varies = variances > len(centre) * np.finfo(np.float64).eps * second
    if not varies.any():
        raise ValueError("the features of the training images do not vary; give other images")
    scale = np.sqrt(np.where(varies, variances, 1.0))
    values, directions = principal_axes(products / np.outer(scale, scale))
    if dim is None:
        dim = int(np.searchsorted(np.cumsum(values), 0.9 * values.sum())) + 1
    if not 0 < dim <= len(centre):
        raise ValueError(f"dim must be at least 1 and at most {len(centre)} features, got {dim}")
    return Principal(centre, scale, directions[:, :dim])


@functools.cache
def virtual_logits(dim: int | None = None) -> Statistic:
    """What `virtual_logit_scale` needs, learned after the moments."""

    def init(head: LinearHead, moments: Moments) -> VirtualLogits:
        return VirtualLogits(residual_space(moments, head, dim), np.zeros(()), np.zeros(()))

    def update(value: VirtualLogits, examples: Examples) -> VirtualLogits:
        inside = (examples.features - value.space.origin) @ value.space.directions
        max_logits = examples.logits.max(axis=1, initial=-np.inf).sum(dtype=np.float64)
        residuals = np.linalg.norm(inside, axis=1).sum()
        return value._replace(
            max_logits=value.max_logits + max_logits, residuals=value.residuals + residuals
        )

    return Statistic(f"virtual logits of {dim}", init, update, _merge, (MOMENTS,))


def virtual_logit_scale(value: VirtualLogits) -> float:
    """Alpha = sum of largest logits / sum of residuals; ValueError if there are no residuals."""
    if not value.residuals:
        raise ValueError(
            "the training features have no part in the residual space; choose a smaller dim, or "
            "give more images"
        )
    return float(value.max_logits / value.residuals)


def _merge(left: VirtualLogits, right: VirtualLogits) -> VirtualLogits:
    return left._replace(
        max_logits=left.max_logits + right.max_logits,
        residuals=left.residuals + right.residuals,
    )
