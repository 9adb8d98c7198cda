"""Gradients of convolutions' kernels, made of products.

Of the input x and the result's cotangent g there is one product of matrices for every offset (a, b)
in the kernel:

    dK[a, b, i, o] = sum_{h, w} x[h + a, w + b, i] g[h, w, o]
                   = sum_{h, w} x[h, w + b, i] g[h - a, w, o]

As the second line says, rows may be shifted in g in place of x. Then all offsets are one product of
an array whose copies are shifted along columns and one whose copies are shifted along rows: for a
kernel of 3 x 3 that is three copies of either instead of nine of x.

Batched over examples these stay what they are. The kernel gradient that JAX derives becomes a
grouped convolution: slow, and wrong where the compiler partitions it over devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradnorm_jax.windows import (
    Array,
    Geometry,
    Parameters,
    channels_last,
    geometry_of,
    offsets_of,
    patches,
    result_channels_last,
    view_at,
)


def kernel_gradient(
    lhs: jax.Array,
    rhs: Array,
    cotangent: jax.Array,
    parameters: Parameters,
    *,
    joined: bool = False,
) -> jax.Array:
    """Gradient with respect to `rhs`, of its shape and type.

    With `joined` it is a single product, fastest for a few examples; without, the input is not
    copied once for each offset unless the copies are small, or the products would be thin.
    """
    x, geometry = channels_last(lhs, rhs, parameters)
    g = result_channels_last(cotangent, parameters)
    groups, precision = parameters["feature_group_count"], parameters["precision"]
    channels, outputs = x.shape[-1] // groups, g.shape[-1]
    if groups > 1:
        product = functools.partial(_grouped_product, groups=groups, precision=precision)
        gradient = _each_offset(x, geometry, lambda view: product(view, g))
    elif joined or _is_thin(geometry, x, g):
        shifts_rows = _shifts_rows_of_cotangent(x, g, geometry, ordered=True)
        gradient = _product(*_factors(x, g, geometry, shifts_rows), precision=precision)
        if shifts_rows:
            gradient = gradient.reshape(-1, channels, geometry.kernel[0], outputs)
            gradient = jnp.moveaxis(gradient, 2, 0)
    else:
        gradient = _each_offset(x, geometry, lambda view: _product(view, g, precision=precision))
    gradient = gradient.reshape(*geometry.kernel, channels, outputs)
    output, channel, *space = parameters["dimension_numbers"].rhs_spec
    return gradient.transpose(np.argsort([*space, channel, output])).astype(rhs.dtype)


def kernel_gradient_entries(
    lhs: jax.Array, rhs: Array, cotangent: jax.Array, parameters: Parameters
) -> jax.Array:
    """The entries of the joined `kernel_gradient`, as they are made: in an order of their own."""
    if parameters["feature_group_count"] > 1:
        return kernel_gradient(lhs, rhs, cotangent, parameters)
    x, g = factors(lhs, rhs, cotangent, parameters)
    return _product(x, g, precision=parameters["precision"]).astype(rhs.dtype)


def factors(
    lhs: jax.Array, rhs: Array, cotangent: jax.Array, parameters: Parameters
) -> tuple[jax.Array, jax.Array]:
    """`[N, *space, K]` and `[N, *space, O]`, whose product over positions has all its entries.

    For convolutions without groups. They are smaller than those of `as_matrices`, and their rows
    need not be output positions.
    """
    x, geometry = channels_last(lhs, rhs, parameters)
    g = result_channels_last(cotangent, parameters)
    return _factors(x, g, geometry, _shifts_rows_of_cotangent(x, g, geometry))


def as_matrices(
    lhs: jax.Array, rhs: Array, cotangent: jax.Array, parameters: Parameters
) -> tuple[jax.Array, jax.Array]:
    """X `[R, K]` and G `[R, O]` such that the kernel's gradient holds the entries of X^T G.

    R counts output positions, K the weights of one output. For convolutions without groups.
    """
    x, geometry = channels_last(lhs, rhs, parameters)
    g = result_channels_last(cotangent, parameters)
    g = g.reshape(-1, g.shape[-1])
    return patches(x, geometry).reshape(len(g), -1), g


def _factors(
    x: jax.Array, g: jax.Array, geometry: Geometry, shifts_rows: bool
) -> tuple[jax.Array, jax.Array]:
    if not shifts_rows:
        return patches(x, geometry), g
    of_x, of_g = _split(geometry, x.shape[1])
    # Where x is shifted up, g is shifted down.
    return patches(x, of_x), patches(g, of_g, reverse=True)


def count_entries_of_factors(lhs: Array, rhs: Array, parameters: Parameters) -> int:
    """How many entries both `factors` have together."""
    numbers = parameters["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    x = tuple(lhs.shape[axis] for axis in (batch, *space, channel))
    geometry = geometry_of(lhs, rhs, parameters)
    return int(min(_count_entries(x, rhs.shape[numbers.rhs_spec[0]], geometry)))


def _shifts_rows_of_cotangent(
    x: jax.Array, g: jax.Array, geometry: Geometry, *, ordered: bool = False
) -> bool:
    """Whether rows are shifted in g: if they can be, and copies are fewer so.

    With `ordered`, what it takes to put the product in the kernel's order counts as well.
    """
    in_x, in_both = _count_entries(x.shape, g.shape[-1], geometry)
    reordering = math.prod(geometry.kernel) * x.shape[-1] * g.shape[-1] if ordered else 0
    return in_x - in_both > reordering


def _count_entries(x: tuple[int, ...], outputs: int, geometry: Geometry) -> tuple[float, float]:
    """Of both factors for x `[N, *space, C]`: if x is shifted alone, and if rows are in g.

    Rows can be shifted in g if all of g's rows are in x; infinity if they are not.
    """
    height, *width = geometry.output
    rows, *columns = geometry.kernel
    examples, rows_of_x, *_, channels = x
    each, others = examples * math.prod(width), math.prod(columns)
    in_x = each * height * (rows * others * channels + outputs)
    if geometry.strides[0] > 1 or geometry.padding[0][2]:
        return in_x, math.inf
    return in_x, each * rows_of_x * (others * channels + rows * outputs)


def _split(geometry: Geometry, height: int) -> tuple[Geometry, Geometry]:
    """The windows of x without their rows, and windows of g that have these.

    All rows of x have their counterparts in g: zeros where there is no row of the result.
    """
    rows, *columns = geometry.kernel
    output = (height, *geometry.output[1:])
    (low, _, _), *of_columns = geometry.padding
    unshifted = [(0, 0, 0)] * len(columns)
    above = (rows - 1) * geometry.dilation[0] - low
    below = height + low - geometry.output[0]
    of_x = geometry._replace(kernel=(1, *columns), output=output, padding=((0, 0, 0), *of_columns))
    of_g = Geometry(
        kernel=(rows, *[1] * len(columns)),
        output=output,
        strides=(1,) * len(output),
        dilation=geometry.dilation,
        padding=((above, below, 0), *unshifted),
    )
    return of_x, of_g


def _is_thin(geometry: Geometry, x: jax.Array, g: jax.Array) -> bool:
    """Whether the products of single offsets would be slow: of few channels, or few positions."""
    return x.shape[-1] < 16 or math.prod(geometry.output) <= g.shape[-1]


def _each_offset(
    x: jax.Array, geometry: Geometry, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`function` of the input under each offset of the kernel, `[offsets, ...]`.

    In a loop: unrolled, each offset would be compiled by itself, in every layer.
    """
    view, offsets = view_at(x, geometry), offsets_of(geometry)
    if len(offsets) == 1:
        return function(view(offsets[0]))[None]
    return lax.map(lambda offset: function(view(offset)), offsets)


def _product(x: jax.Array, g: jax.Array, *, precision: Any) -> jax.Array:
    """`[N, *space, C], [N, *space, O] -> [C, O]`."""
    axes = tuple(range(x.ndim - 1))
    return _dot(x, g, ((axes, axes), ((), ())), precision)


def _grouped_product(x: jax.Array, g: jax.Array, *, groups: int, precision: Any) -> jax.Array:
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
