"""Gram matrices of inner activations, and how far they leave the ranges of training images."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gradnorm_jax.numerics import (
    as_rows,
    check_count,
    divide_or_zero,
    to_common_float,
    to_float32_at_least,
)
from gradnorm_jax.per_example import Tap, taps
from gradnorm_jax.scores.inner import Layers, parts
from gradnorm_jax.types import Model

_OF_RANGES, _OF_MEANS = 1e-6, 1e-7
"""What the authors add to ends of ranges and to means before they divide by them."""


class GramRanges(NamedTuple):
    """Between what values training images have the row sums of Gram matrices.

    Attributes:
        low: `[C, K]`, of the images that are predicted to be of a class, or `[1, K]`, of all.
        high: likewise.
    """

    low: jax.Array
    high: jax.Array


class GramFit(NamedTuple):
    """What training images tell of Gram matrices.

    Attributes:
        ranges: of their row sums.
        scale: `[L]`, the mean deviation in each layer of images that the ranges are not from.
    """

    ranges: GramRanges
    scale: jax.Array


def gram_rows(
    model: Model, images: jax.Array, *, layers: Layers = 4, powers: int = 10
) -> dict[str, jax.Array]:
    r"""Row sums of Gram matrices of powers of activations.

    .. math:: g_{l, p, k} = \Big(\sum_j \sum_i F_{l, k, i}^p F_{l, j, i}^p\Big)^{1/p}, \quad p = 1
        .. P

    with F_l `[channels, positions]`, a root of what is below zero being that of its absolute value
    with its sign. A row's sum is that of F_k^p times the sum of all channels, so that no Gram
    matrix is ever formed. Costs a forward pass up to the last of the layers.

    Args:
        model: the network, whose activations have their channels last.
        images: `[B, ...]`.
        layers: which.
        powers: P.

    Returns:
        `[B, P channels]` by layer, squared activations.

    Raises:
        ValueError: `powers` is not at least 1.
    """
    check_count("powers", powers)
    names = parts(model, images, layers)
    return taps(model, names, {"output"}, reduce=_RowSums(powers))(images)


@dataclasses.dataclass(frozen=True)
class _RowSums:
    powers: int

    def __call__(self, name: str, tap: Tap) -> jax.Array:
        x = to_float32_at_least(tap.output).reshape(-1, tap.output.shape[-1])
        own = jnp.abs(x).max(axis=0)
        largest = own.max()
        # Divided by its largest entry, what is raised to a power does not overflow.
        channel, all_channels = divide_or_zero(x, own[None]), divide_or_zero(x, largest)
        rows = []
        for p in range(1, self.powers + 1):
            sums = (channel**p * (all_channels**p).sum(axis=1, keepdims=True)).sum(axis=0)
            rows.append(jnp.sign(sums) * jnp.abs(sums) ** (1 / p) * own * largest)
        return jnp.concatenate(rows)


def gram_deviations(rows: dict[str, jax.Array], logits: ArrayLike, ranges: GramRanges) -> jax.Array:
    r"""How far row sums lie outside of their ranges, relatively, summed layer by layer.

    .. math:: \delta_l = \sum_{p, k} \frac{(a - g)_+}{|a + \epsilon|} + \frac{(g - b)_+}{|b +
        \epsilon|}

    with [a, b] the range of g among training images of the predicted class, and epsilon = 1e-6.

    Args:
        rows: `[B, K_l]` by layer, from `gram_rows`.
        logits: `[B, C]`.
        ranges: of training images, over the K_l of all layers one after another.

    Returns:
        `[B, L]`, at least zero.
    """
    z, low, high, *found = to_common_float(as_rows("logits", logits, "C"), *ranges, *rows.values())
    if len(low) > 1:
        predicted = z.argmax(axis=1)
        low, high = low[predicted], high[predicted]
    g = jnp.concatenate(found, axis=1)
    off = jax.nn.relu(low - g) / jnp.abs(low + _OF_RANGES)
    off += jax.nn.relu(g - high) / jnp.abs(high + _OF_RANGES)
    ends = [sum(x.shape[1] for x in found[: i + 1]) for i in range(len(found))]
    return jnp.stack([x.sum(axis=1) for x in jnp.split(off, ends[:-1], axis=1)], axis=1)


def gram(deviations: ArrayLike, logits: ArrayLike, scale: ArrayLike) -> jax.Array:
    r"""Negative deviation of Gram matrices from those of training images.

    .. math:: S = -\frac{1}{\max_c p_c} \sum_l \frac{\delta_l}{E \, \delta_l +
        10^{-7}}

    Args:
        deviations: `[B, L]`, from `gram_deviations`.
        logits: `[B, C]`.
        scale: `[L]`, the mean deviations of held-out images, in each layer.

    Returns:
        `[B]`, at most zero; higher is more in-distribution.

    References:
        Sastry, Oore (2020), "Detecting Out-of-Distribution Examples with Gram Matrices". As in the
        authors' code, of the row sums of each matrix instead of all its entries; the factor 1 /
        max p is theirs, too. Their means are over images of the test set, and there are divided by
        max p as well. https://arxiv.org/abs/1912.12510
    """
    rows, z, mean = to_common_float(
        as_rows("deviations", deviations, "L"), as_rows("logits", logits, "C"), scale
    )
    confidence = jax.nn.softmax(z).max(axis=1)
    return -(rows / (mean + _OF_MEANS)[None]).sum(axis=1) / confidence
