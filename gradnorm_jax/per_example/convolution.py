"""Convolutions whose kernel gradient is made of matrix products, so that it batches well.

Batched over examples, the kernel gradient that JAX derives is a grouped convolution: slow, and
wrong where the compiler partitions it over devices. Here it is, for every offset (a, b) in the
kernel, the product of the input shifted by that offset and the output's cotangent:

    dK[a, b, i, o] = sum_{h, w} x[h + a, w + b, i] g[h, w, o]

which batched over examples stays a batched matrix product.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Parameters = dict[str, Any]
"""Of `lax.conv_general_dilated_p`, as an equation of a jaxpr holds them."""


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


def convolve(lhs: jax.Array, rhs: jax.Array, parameters: Parameters) -> jax.Array:
    """The convolution with these parameters, its gradient for `rhs` made of products."""

    @jax.custom_vjp
    def convolution(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated_p.bind(lhs, rhs, **parameters)

    def forward(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return convolution(lhs, rhs), (lhs, rhs)

    def backward(
        operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        of_rhs = kernel_gradient(*operands, cotangent, parameters)
        return input_gradient(*operands, cotangent, parameters), of_rhs

    convolution.defvjp(forward, backward)
    return convolution(lhs, rhs)


def input_gradient(
    lhs: jax.Array, rhs: jax.Array, cotangent: jax.Array, parameters: Parameters
) -> jax.Array:
    """Gradient with respect to `lhs`, as JAX derives it."""

    def convolution(lhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated_p.bind(lhs, rhs, **parameters)

    (gradient,) = jax.linear_transpose(convolution, lhs)(cotangent)
    return gradient


def kernel_gradient(
    lhs: jax.Array,
    rhs: jax.Array | jax.ShapeDtypeStruct,
    cotangent: jax.Array,
    parameters: Parameters,
    *,
    joined: bool = False,
) -> jax.Array:
    """Gradient with respect to `rhs`, of its shape and type.

    With `joined` it is a single product, fastest for a few examples; without, the input is not
    copied once for each offset unless the copies are small.
    """
    x, g, geometry = _channels_last(lhs, rhs, cotangent, parameters)
    groups, precision = parameters["feature_group_count"], parameters["precision"]
    if groups > 1:
        products = [_grouped_product(v, g, groups, precision) for v in _patches(x, geometry, 0)]
    else:
        axes = len(geometry.kernel) if joined else _axes_to_join(geometry, x, g)
        products = [_product(v, g, precision) for v in _patches(x, geometry, axes)]
    channels = x.shape[-1] // groups
    gradient = jnp.stack(products).reshape(*geometry.kernel, channels, g.shape[-1])
    output, channel, *space = parameters["dimension_numbers"].rhs_spec
    return gradient.transpose(np.argsort([*space, channel, output])).astype(rhs.dtype)


def as_matrices(
    lhs: jax.Array,
    rhs: jax.Array | jax.ShapeDtypeStruct,
    cotangent: jax.Array,
    parameters: Parameters,
) -> tuple[jax.Array, jax.Array]:
    """X `[R, K]` and G `[R, O]` such that the kernel's gradient holds the entries of X^T G.

    R counts output positions, K the weights of one output. For convolutions without groups.
    """
    x, g, geometry = _channels_last(lhs, rhs, cotangent, parameters)
    (patches,) = _patches(x, geometry, len(geometry.kernel))
    return patches.reshape(-1, patches.shape[-1]), g.reshape(-1, g.shape[-1])


def _channels_last(
    lhs: jax.Array,
    rhs: jax.Array | jax.ShapeDtypeStruct,
    cotangent: jax.Array,
    parameters: Parameters,
) -> tuple[jax.Array, jax.Array, Geometry]:
    numbers = parameters["dimension_numbers"]

    def move(array: jax.Array, spec: tuple[int, ...]) -> jax.Array:
        batch, channel, *space = spec
        return array.transpose(batch, *space, channel)

    x, g = move(lhs, numbers.lhs_spec), move(cotangent, numbers.out_spec)
    padding = zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    geometry = Geometry(
        kernel=tuple(rhs.shape[axis] for axis in numbers.rhs_spec[2:]),
        output=g.shape[1:-1],
        strides=parameters["window_strides"],
        dilation=parameters["rhs_dilation"],
        padding=tuple((low, high, dilation - 1) for (low, high), dilation in padding),
    )
    return x, g, geometry


def _patches(x: jax.Array, geometry: Geometry, joined: int) -> Iterator[jax.Array]:
    """The input under each offset of the kernel, `[N, *output, block * C]`.

    The offsets along the last `joined` axes of the kernel form one block, those along the others
    are yielded one after another.
    """
    zero = jnp.zeros((), x.dtype)
    padded = lax.pad(x, zero, ((0, 0, 0), *geometry.padding, (0, 0, 0)))

    def view(offset: tuple[int, ...]) -> jax.Array:
        start = np.multiply(offset, geometry.dilation)
        stop = start + np.multiply(np.subtract(geometry.output, 1), geometry.strides) + 1
        return lax.slice(
            padded,
            (0, *start.tolist(), 0),
            (x.shape[0], *stop.tolist(), x.shape[-1]),
            (1, *geometry.strides, 1),
        )

    split = len(geometry.kernel) - joined
    for outer in itertools.product(*map(range, geometry.kernel[:split])):
        inner = itertools.product(*map(range, geometry.kernel[split:]))
        yield jnp.concatenate([view(outer + offset) for offset in inner], axis=-1)


def _axes_to_join(geometry: Geometry, x: jax.Array, g: jax.Array) -> int:
    """How many axes of the kernel to join: all while patches are smaller than the gradient."""
    if math.prod(geometry.output) <= g.shape[-1]:
        return len(geometry.kernel)
    # Products thinner than this are slow.
    return 0 if x.shape[-1] >= 16 else 1


def _product(x: jax.Array, g: jax.Array, precision: Any) -> jax.Array:
    """`[N, *space, C], [N, *space, O] -> [C, O]`."""
    axes = tuple(range(x.ndim - 1))
    return _dot(x, g, ((axes, axes), ((), ())), precision)


def _grouped_product(x: jax.Array, g: jax.Array, groups: int, precision: Any) -> jax.Array:
    """`[N, *space, C], [N, *space, O] -> [C / groups, O]`, every group by itself."""
    axes = tuple(range(x.ndim - 1))
    x = x.reshape(*x.shape[:-1], groups, -1)
    g = g.reshape(*g.shape[:-1], groups, -1)
    if x.shape[-1] == 1:  # depthwise: no matrices, a sum over positions for each channel
        return (x * g).sum(axis=axes).reshape(1, -1)
    group = (x.ndim - 2,)
    product = _dot(x, g, ((axes, axes), (group, group)), precision)
    return product.swapaxes(0, 1).reshape(x.shape[-1], -1)


def _dot(x: jax.Array, g: jax.Array, dimensions: Any, precision: Any) -> jax.Array:
    accumulator = np.promote_types(x.dtype, np.float32)
    return lax.dot_general(
        x, g, dimensions, precision=precision, preferred_element_type=accumulator
    )
