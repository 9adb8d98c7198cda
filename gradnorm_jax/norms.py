"""Entrywise norms of arrays `[B, ...]`, the one norm of the whole library."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.numerics import check_orders, to_float32_at_least

Orders = float | Sequence[float]
"""The order of a norm, or several orders."""


def entrywise_norm(x: jax.Array, *, ord: Orders = 1) -> jax.Array:
    r"""Entrywise norm of each example of a batch, over all axes but the first.

    .. math:: \|x\|_q = \Big(\sum_i |x_i|^q\Big)^{1/q}, \quad \|x\|_\infty = \max_i |x_i|

    Entries are divided by the largest before a power is taken, so that neither small nor large
    orders overflow or underflow where the norm itself does not; zeros give zero. Inputs narrower
    than float32 are widened to it before anything is added. Where the norm has no derivative, at
    zeros, the derivative is taken to be zero.

    Args:
        x: `[B, ...]`, real.
        ord: q, at least 0.5, or `math.inf`. Below 1 it is a quasi-norm. Or several, `(1, 2)`.

    Returns:
        `[B]`, of several orders `[B, K]`, >= 0, in float32 or in the type of `x` if that is wider.

    Raises:
        ValueError: an order is below 0.5 or not a number, or there are none.
    """
    check_orders(ord)
    if isinstance(ord, Sequence):
        return jnp.stack([entrywise_norm(x, ord=each) for each in ord], axis=1)
    x = to_float32_at_least(x)
    size = jnp.abs(x) if jnp.iscomplexobj(x) else _absolute(x)
    axes = tuple(range(1, size.ndim))
    if ord == 1:
        # In two steps: compilers for CPUs fuse the first with what comes before, and vectorise it.
        return size.sum(axis=axes[:-1]).sum(axis=-1) if len(axes) > 1 else size.sum(axis=axes)
    largest = size.max(axis=axes, keepdims=True, initial=0)
    if math.isinf(ord):
        return largest.reshape(x.shape[0])
    # An infinite entry is not a scale: dividing by it would make the norm nan instead of infinite.
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    # The norm does not depend on the scale, so its derivative need not go through it.
    scale = jax.lax.stop_gradient(scale)
    total = power(size / scale, ord).sum(axis=axes)
    return scale.reshape(x.shape[0]) * power(total, 1 / ord)


def combine_norms(norms: Mapping[str, jax.Array], *, ord: Orders = 1) -> jax.Array:
    """The norm over the concatenation of several arrays, from the norm of each.

    Args:
        norms: norms of the parts, all of order `ord`, by name: `[B]`, or `[B, K]` of K orders.
        ord: their order, or orders, as in `entrywise_norm`.

    Returns:
        `[B]`, or `[B, K]`, the norms of all parts taken as one vector.

    Raises:
        ValueError: an order is below 0.5 or not a number, there are no parts, or not as many norms
            of each as orders.
    """
    if not norms:
        raise ValueError("norms is empty; give the norm of at least one part")
    check_orders(ord)
    parts = jnp.stack(list(norms.values()), axis=1)
    if parts.shape[2:] != np.shape(ord):
        got = next(iter(norms.values())).shape
        raise ValueError(f"norms must be [B], or [B, K] of K orders; got {got} for ord={ord}")
    return norms_of_norms(parts, ord=ord)


def norms_of_norms(norms: jax.Array, *, ord: Orders) -> jax.Array:
    """`combine_norms` of parts that are stacked: `[B, ...] -> [B]`, or `[B, ..., K] -> [B, K]`."""
    if not isinstance(ord, Sequence):
        return entrywise_norm(norms, ord=ord)
    combined = [entrywise_norm(norms[..., i], ord=each) for i, each in enumerate(ord)]
    return jnp.stack(combined, axis=1)


@jax.custom_jvp
def _absolute(x: jax.Array) -> jax.Array:
    """Absolute values, with a derivative of zero at zero, where `jnp.abs` has 1."""
    return jnp.abs(x)


@_absolute.defjvp
def _absolute_jvp(x: tuple[jax.Array], tangent: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.abs(*x), jnp.sign(*x) * tangent[0]


def power(x: jax.Array, exponent: float) -> jax.Array:
    """`x ** exponent` for x >= 0, by a root or a product where that is exact and cheap."""
    if exponent == int(exponent):
        return x ** int(exponent)
    # A root has no derivative at zero; its own where would multiply infinity by zero.
    is_zero = x == 0
    positive = jnp.where(is_zero, jnp.ones_like(x), x)
    root = jnp.sqrt(positive) if exponent == 0.5 else positive**exponent
    return jnp.where(is_zero, jnp.zeros_like(x), root)
