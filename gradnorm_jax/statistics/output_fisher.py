"""The mean covariance of labels drawn from the softmax: the output's half of the head's Fisher."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.posterior import HeadFisher
from gradnorm_jax.statistics.directions import with_one
from gradnorm_jax.statistics.moments import Moments, mean, merge_sums, principal_axes
from gradnorm_jax.statistics.softmax import softmax
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class OutputFisher(NamedTuple):
    """Sums over softmaxes p.

    Attributes:
        num_images: `[]`.
        covariances: `[C, C]`, sum of diag p - p p^T.
    """

    num_images: np.ndarray
    covariances: np.ndarray


def head_fisher(
    moments: Moments, output: OutputFisher, *, damping: float = 1e-3, include_bias: bool = True
) -> HeadFisher:
    """Roots of the inverse of the last layer's Fisher information, as a Kronecker product.

    Args:
        moments: of training features.
        output: of their softmaxes.
        damping: what is added to each factor's diagonal, in units of its mean eigenvalue.
        include_bias: append the constant 1 by which a bias is multiplied.

    Raises:
        ValueError: there are no images, the damping is not positive, or all images are predicted
            with certainty.
    """
    mean(moments)
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping!r}")
    products = with_one(moments) if include_bias else moments.products
    return HeadFisher(
        _inverse_root(products / moments.num_images, damping),
        _inverse_root(output.covariances / output.num_images, damping),
    )


def _inverse_root(matrix: np.ndarray, damping: float) -> jax.Array:
    values, vectors = principal_axes(matrix)
    values = np.maximum(values, 0)
    if not values.any():
        raise ValueError(
            "the training images' features are all zero or their softmaxes all certain, so there "
            "is no Fisher information to measure with"
        )
    return jnp.asarray(vectors / np.sqrt(values + damping * values.mean()))


def _none(head: LinearHead) -> OutputFisher:
    num_classes = head.kernel.shape[1]
    return OutputFisher(np.array(0.0), np.zeros((num_classes, num_classes)))


def _update(value: OutputFisher, examples: Examples) -> OutputFisher:
    p = softmax(examples.logits)
    new = OutputFisher(np.array(float(len(p))), np.diag(p.sum(axis=0)) - p.T @ p)
    return merge_sums(value, new)


OUTPUT_FISHER = Statistic("softmax covariances", _none, _update, merge_sums)
"""Of the softmax, diag p - p p^T."""
