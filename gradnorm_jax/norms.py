"""Entrywise norms of arrays `[B, ...]`, the one norm of the whole library."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gradnorm_jax.numerics import check_order, to_float32_at_least


def entrywise_norm(x: jax.Array, *, ord: float = 1) -> jax.Array:
    r"""Entrywise norm of each example of a batch, over all axes but the first.

    .. math:: \|x\|_q = \Big(\sum_i |x_i|^q\Big)^{1/q}, \quad \|x\|_\infty = \max_i |x_i|

    Entries are divided by the largest before a power is taken, so that neither small nor large
    orders overflow or underflow where the norm itself does not; zeros give zero. Inputs narrower
    than float32 are widened to it before anything is added. Where the norm has no derivative, at
    zeros, the derivative is taken to be zero.

    Args:
        x: `[B, ...]`, real.
        ord: q, at least 0.5, or `math.inf`. Below 1 it is a quasi-norm.

    Returns:
        `[B]`, >= 0, in float32 or in the type of `x` if that is wider.

    Raises:
        ValueError: the order is below 0.5 or not a number.
    """
    check_order(ord)
    size = _absolute(to_float32_at_least(x))
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
    total = _power(size / scale, ord).sum(axis=axes)
    return scale.reshape(x.shape[0]) * _power(total, 1 / ord)


def combine_norms(norms: Mapping[str, jax.Array], *, ord: float = 1) -> jax.Array:
    """The norm over the concatenation of several arrays, from the norm of each.

    Args:
        norms: norms `[B]` of the parts, all of order `ord`, by name.
        ord: their order, as in `entrywise_norm`.

    Returns:
        `[B]`, the norm of all parts taken as one vector.

    Raises:
        ValueError: the order is below 0.5 or not a number, or there are no parts.
    """
    if not norms:
        raise ValueError("norms is empty; give the norm of at least one part")
    return entrywise_norm(jnp.stack(list(norms.values()), axis=1), ord=ord)


def _absolute(x: jax.Array) -> jax.Array:
    """Absolute values, with a derivative of zero at zero, where `jnp.abs` has 1."""
    if jnp.iscomplexobj(x):
        return jnp.abs(x)
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """`x ** exponent` for x >= 0, by a root or a product where that is exact and cheap."""
    if exponent == int(exponent):
        return x ** int(exponent)
    # A root has no derivative at zero; its own where would multiply infinity by zero.
    is_zero = x == 0
    positive = jnp.where(is_zero, jnp.ones_like(x), x)
    root = jnp.sqrt(positive) if exponent == 0.5 else positive**exponent
    return jnp.where(is_zero, jnp.zeros_like(x), root)
