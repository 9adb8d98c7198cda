"""Windows of a convolution: its input under each offset of the kernel."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Parameters = dict[str, Any]
"""Of `lax.conv_general_dilated_p`, as an equation of a jaxpr holds them."""

Array = jax.Array | jax.ShapeDtypeStruct

_FEW_OFFSETS = 3
"""A row or a column of the usual kernel."""


class Geometry(NamedTuple):
    """A convolution in the order `[N, *space, C]`, with a kernel `[*space, C / groups, O]`.

    Attributes:
        kernel: spatial extent of the kernel.
        output: spatial extent of the output.
        strides: of the window.
        dilation: of the kernel.
        padding: `(low, high, interior)` of each spatial axis of the input.
    """

    kernel: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int, int], ...]


def channels_last(lhs: jax.Array, rhs: Array, parameters: Parameters) -> tuple[jax.Array, Geometry]:
    """The input in the order `[N, *space, C]`, and what is done to it."""
    batch, channel, *space = parameters["dimension_numbers"].lhs_spec
    return lhs.transpose(batch, *space, channel), geometry_of(lhs, rhs, parameters)


def geometry_of(lhs: Array, rhs: Array, parameters: Parameters) -> Geometry:
    """What is done to the input."""
    numbers = parameters["dimension_numbers"]
    kernel = np.asarray([rhs.shape[axis] for axis in numbers.rhs_spec[2:]])
    dilation, strides = parameters["rhs_dilation"], parameters["window_strides"]
    pairs = zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    padding = tuple((low, high, spacing - 1) for (low, high), spacing in pairs)
    low, high, interior = np.transpose(padding)
    size = np.asarray([lhs.shape[axis] for axis in numbers.lhs_spec[2:]])
    room = low + high + size + interior * np.maximum(size - 1, 0)
    window = (kernel - 1) * dilation + 1
    output = np.maximum((room - window) // strides + 1, 0)
    return Geometry(tuple(kernel.tolist()), tuple(output.tolist()), strides, dilation, padding)


def count_offsets(rhs: Array, parameters: Parameters) -> int:
    """How many entries the kernel has for each pair of channels."""
    return math.prod(rhs.shape[axis] for axis in parameters["dimension_numbers"].rhs_spec[2:])


def result_channels_last(result: jax.Array, parameters: Parameters) -> jax.Array:
    """The result, or its cotangent, in the order `[N, *output, O]`."""
    batch, channel, *space = parameters["dimension_numbers"].out_spec
    return result.transpose(batch, *space, channel)


def views(x: jax.Array, geometry: Geometry) -> Iterator[jax.Array]:
    """The input under one offset of the kernel after the other, `[N, *output, C]`."""
    padded = _padded(x, geometry)
    size = _extent(padded, geometry)
    for offset in offsets_of(geometry).tolist():
        stop = np.add(offset, size).tolist()
        yield lax.slice(padded, offset, stop, (1, *geometry.strides, 1))


def patches(x: jax.Array, geometry: Geometry, *, reverse: bool = False) -> jax.Array:
    """The input under all offsets of the kernel, `[N, *output, offsets * C]`.

    Few are joined at once; many are put together in a loop, which takes less to compile.
    """
    step = -1 if reverse else 1
    offsets = offsets_of(geometry)[::step]
    if len(offsets) <= _FEW_OFFSETS:
        return jnp.concatenate([*views(x, geometry)][::step], axis=-1)
    view = view_at(x, geometry)
    first = view(offsets[0])

    def put(number: jax.Array, joined: jax.Array) -> jax.Array:
        part = view(jnp.asarray(offsets)[number])
        return lax.dynamic_update_index_in_dim(joined, part, number, axis=-2)

    shape = (*first.shape[:-1], len(offsets), first.shape[-1])
    joined = jnp.broadcast_to(first[..., None, :], shape)
    return lax.fori_loop(1, len(offsets), put, joined).reshape(*first.shape[:-1], -1)


def view_at(x: jax.Array, geometry: Geometry) -> Callable[[jax.Array], jax.Array]:
    """`offset -> view`, of those of `offsets_of`, which may be known only at run time."""
    padded = _padded(x, geometry)
    size = _extent(padded, geometry)

    def view(offset: jax.Array) -> jax.Array:
        every = lax.dynamic_slice(padded, offset, size)
        return lax.slice(every, [0] * every.ndim, size, (1, *geometry.strides, 1))

    return view


def _padded(x: jax.Array, geometry: Geometry) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *geometry.padding, (0, 0, 0)))


def offsets_of(geometry: Geometry) -> np.ndarray:
    """Where the view of each entry of the kernel begins, `[offsets, axes of the input]`."""
    indices = list(itertools.product([0], *map(range, geometry.kernel), [0]))
    return np.multiply(indices, (1, *geometry.dilation, 1)).astype(np.int32)


def _extent(padded: jax.Array, geometry: Geometry) -> list[int]:
    """Of a view, before all but every so many of its entries are left out."""
    space = np.multiply(np.subtract(geometry.output, 1), geometry.strides) + 1
    return [padded.shape[0], *space.tolist(), padded.shape[-1]]
