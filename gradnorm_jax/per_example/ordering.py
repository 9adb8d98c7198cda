"""The order in which a compiler computes what does not depend on each other."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def after(x: jax.Array, event: Any) -> jax.Array:
    """Returns `x` with an artificial data dependency on `event`.

    XLA computes what it can as soon as it can, finds what is computed twice, and keeps the result
    for the second time, however large. What follows from `after(x, event)` is computed anew.

    A `jax.lax.optimization_barrier` is to do the same, but XLA for CPUs drops barriers before it
    plans, as of jaxlib 0.10. Here the value is chosen by a condition of which compilers do not know
    that it never holds: a number that differs from itself and is equal to itself. It is a branch,
    not a selection of entries, which would be part of all that is computed of them, and compiled.

    Args:
        x: an array of numbers.
        event: pytree of arrays, of real numbers those that count.
    """
    numbers = [
        leaf[(0,) * leaf.ndim]
        for leaf in jax.tree.leaves(event)
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    for number in numbers:
        x = lax.cond((number != number) & (number == number), jnp.negative, _same, x)
    return x


def _same(x: jax.Array) -> jax.Array:
    return x
