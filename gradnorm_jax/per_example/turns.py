"""A few examples of a batch at a time."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def in_turns(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
    step: int,
) -> jax.Array:
    """`function` of every example, `[B, ...]`, in a loop over parts of the batch.

    Args:
        function: `(*arrays of one example) -> array`.
        arrays: `[B, ...]`.
        axes: of each, that which a convolution takes as its batch; None if it has none. The
            examples are joined there, as the convolution itself joins them: otherwise the compiler
            keeps both forms of an array, and computes all that is before them twice.
        step: how many examples to take at a time, of which B is a multiple: a remainder would be
            compiled by itself.
    """
    size = len(arrays[0])
    joined = list(map(_join, arrays, axes))

    def of_part(start: jax.Array) -> jax.Array:
        part = functools.partial(_part, start=start, step=step, size=size)
        parts = list(map(part, joined, axes))
        # One by itself: reductions of batches of one are slow on CPUs, as of jaxlib 0.10.
        return function(*[x[0] for x in parts])[None] if step == 1 else jax.vmap(function)(*parts)

    results = lax.map(of_part, jnp.arange(0, size, step))
    return results.reshape(size, *results.shape[2:])


def _join(x: jax.Array, axis: int | None) -> jax.Array:
    if axis is None:
        return x
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _part(x: jax.Array, axis: int | None, *, start: jax.Array, step: int, size: int) -> jax.Array:
    """`step` examples `[step, ...]` of those that are joined."""
    if axis is None:
        return lax.dynamic_slice_in_dim(x, start, step)
    each = x.shape[axis] // size
    part = lax.dynamic_slice_in_dim(x, start * each, step * each, axis)
    part = part.reshape(*x.shape[:axis], step, each, *x.shape[axis + 1 :])
    return jnp.moveaxis(part, axis, 0)
