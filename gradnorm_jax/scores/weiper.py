"""WeiPer: how the entries of features, and of randomly turned logits, are distributed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, to_common_float

Carry = TypeVar("Carry")

_ROWS = 64
"""Of one matrix product: with fewer, reading the other factor takes most of the time."""


class Perturbation(NamedTuple):
    """How the last layer is turned, many times over.

    Attributes:
        repeats: r, how many times.
        distance: delta, how far, as a multiple of the length of each class's weights.
        seed: of the directions.
    """

    repeats: int = 100
    distance: float = 2.4
    seed: int = 0


class Range(NamedTuple):
    """The smallest and the largest number of a kind that training images give."""

    low: Any
    high: Any


class Densities(NamedTuple):
    """How training images are distributed.

    Attributes:
        features: range of the features.
        logits: range of the perturbed logits.
        feature_density: `[bins]`, mean share of an image's features in each of the equal bins of
            their range.
        logit_density: the same of its perturbed logits.
    """

    features: Range
    logits: Range
    feature_density: Any
    logit_density: Any


def weiper(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    densities: Densities,
    *,
    perturbation: Perturbation,
    lambda_1: float = 2.5,
    lambda_2: float = 0.25,
    smoothing: int = 40,
    smoothing_perturbed: int = 15,
) -> jax.Array:
    r"""WeiPer+KLD: divergences from the training images' densities, and mean confidence.

    .. math:: S = -KL_s(q(h) \| \bar q) - \lambda_1 KL_s(q(\tilde z) \| \bar q_w)
       + \lambda_2 \frac{1}{r} \sum_i \max_c softmax(\tilde z_i)_c

    KL_s is the sum of both directions, after the image's own density q is smoothed by a moving
    average and 0.01 (features) or 0.025 (logits) is added to both; the perturbed logits are those
    of the weights w_c + delta \|w_c\| n, n random directions. The r directions of a class are one
    isotropic draw under r random changes of its signs: each is as random as a draw of its own, and
    any two are uncorrelated, but drawing them costs no more than one.

    Args:
        features: `[B, D]`.
        kernel: `[D, C]`, the last layer's.
        bias: `[C]`.
        densities: of training images, from `statistics.densities`, with the same perturbation.
        perturbation: of the last layer. Of its r parts few are in memory at once.
        lambda_1: weight of the perturbed logits' divergence.
        lambda_2: weight of their confidence.
        smoothing: width of the moving average, in bins.
        smoothing_perturbed: that for perturbed logits.

    Returns:
        `[B]`; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Granz, Heurich, Landgraf (2024), "WeiPer: OOD Detection using Weight Perturbations of Class
        Projections". Their code averages densities by position in a batch, so that the last, short
        batch weighs otherwise; here all images weigh the same. https://arxiv.org/abs/2405.17164
    """
    rows, kernel, bias = to_common_float(as_rows("features", features, "D"), kernel, bias)
    densities = jax.tree.map(lambda x: jnp.asarray(x, rows.dtype), densities)
    own, perturbed, confidence = image_densities(
        rows, kernel, bias, densities, perturbation=perturbation
    )
    divergence = _divergence(densities.feature_density, own, smoothing, 0.01)
    turned = _divergence(densities.logit_density, perturbed, smoothing_perturbed, 0.025)
    return lambda_2 * confidence - divergence - lambda_1 * turned


def image_densities(
    rows: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    densities: Densities,
    *,
    perturbation: Perturbation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each image's densities, `[B, bins]`, of features and perturbed logits; its confidence."""
    bins = len(densities.feature_density)

    def add(carry: tuple[jax.Array, jax.Array], logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts, confidence = carry
        counts = counts + _counts(logits.reshape(len(rows), -1), densities.logits, bins)
        return counts, confidence + jax.nn.softmax(logits, axis=2).max(axis=2).sum(axis=1)

    nothing = jnp.zeros((len(rows), bins), rows.dtype), jnp.zeros(len(rows), rows.dtype)
    counts, confidence = _over_parts(add, nothing, rows, kernel, bias, perturbation)
    size, total = rows.shape[1], kernel.shape[1] * perturbation.repeats
    own = _counts(rows, densities.features, bins) / size
    return own, counts / total, confidence / perturbation.repeats


def logit_range(
    rows: jax.Array, kernel: jax.Array, bias: jax.Array, *, perturbation: Perturbation
) -> Range:
    """The range of the perturbed logits of all rows, of one at least."""

    def widen(carry: Range, logits: jax.Array) -> Range:
        return Range(jnp.minimum(carry.low, logits.min()), jnp.maximum(carry.high, logits.max()))

    infinity = jnp.asarray(jnp.inf, rows.dtype)
    return _over_parts(widen, Range(infinity, -infinity), rows, kernel, bias, perturbation)


def _over_parts(
    function: Callable[[Carry, jax.Array], Carry],
    carry: Carry,
    rows: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    perturbation: Perturbation,
) -> Carry:
    """Folds `function` over the perturbed logits, part by part, `[B, some of the r, C]`."""
    # The directions are part of the method: they must not change with a session's default.
    key, for_signs = jax.random.split(jax.random.key(perturbation.seed, impl="threefry2x32"))
    # Neither depends on the type of the kernel, by which other numbers would be drawn.
    directions = jax.random.normal(key, kernel.shape, jnp.float32).astype(kernel.dtype)
    lengths = jnp.linalg.norm(kernel, axis=0, keepdims=True)
    turns = perturbation.distance * lengths / jnp.linalg.norm(directions, axis=0, keepdims=True)
    bits = jax.random.bits(for_signs, (perturbation.repeats, rows.shape[1]), jnp.uint32) & 1
    signs = jnp.where(bits == 1, jnp.ones((), rows.dtype), -jnp.ones((), rows.dtype))
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    logits = (matmul(rows, kernel) + bias[None])[:, None]

    def step(carry: Carry, some: jax.Array) -> tuple[Carry, None]:
        # Flipping features by signs turns the product as flipping the directions does.
        flipped = (rows[:, None] * some[None]).reshape(-1, rows.shape[1])
        turned = (turns * matmul(flipped, directions)).reshape(len(rows), len(some), -1)
        return function(carry, logits + turned), None

    repeats = perturbation.repeats
    at_once = max(
        n for n in range(1, repeats + 1) if repeats % n == 0 and (n - 1) * len(rows) < _ROWS
    )
    return jax.lax.scan(step, carry, signs.reshape(-1, at_once, signs.shape[1]))[0]


def _counts(values: jax.Array, within: Range, bins: int) -> jax.Array:
    """How many of each row's values `[B, N]` lie in each bin of a range, `[B, bins]`."""
    width = (within.high - within.low) / bins
    width = jnp.where(width > 0, width, jnp.ones_like(width))
    index = jnp.floor((values - within.low) / width)
    # The largest closes the last bin; what lies outside of the range is counted nowhere.
    index = jnp.where(values == within.high, jnp.full_like(index, bins - 1), index)
    index = jnp.where((index < 0) | (values > within.high), jnp.full_like(index, bins), index)
    index = jnp.minimum(index, bins).astype(jnp.int32)
    counts = jnp.zeros((len(values), bins + 1), values.dtype)
    return counts.at[jnp.arange(len(values))[:, None], index].add(1)[:, :bins]


def _divergence(train: jax.Array, own: jax.Array, smoothing: int, floor: float) -> jax.Array:
    """KL in both directions between a density `[bins]` and each of `[B, bins]`, smoothed."""
    left = (smoothing - 1) // 2
    padded = jnp.pad(own, ((0, 0), (left, smoothing - 1 - left)), mode="edge")
    ends = jnp.pad(jnp.cumsum(padded, axis=1), ((0, 0), (1, 0)))
    smooth = (ends[:, smoothing:] - ends[:, :-smoothing]) / smoothing
    p, q = train[None] + floor, smooth + floor
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    return ((p - q) * (jnp.log(p) - jnp.log(q))).sum(axis=1)
