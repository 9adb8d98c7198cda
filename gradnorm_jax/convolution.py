"""Convolutions, and the gradients of their kernels, made of products.

There is one product for every offset (a, b) in the kernel, of the input shifted by that offset. In
a depthwise convolution it is that with the kernel's entry, channel by channel,

    y[h, w, i] = sum_{a, b} x[h + a, w + b, i] K[a, b, i]

and in the gradient of any kernel that with the output's cotangent, a product of matrices:

    dK[a, b, i, o] = sum_{h, w} x[h + a, w + b, i] g[h, w, o]

Batched over examples these stay what they are. The kernel gradient that JAX derives becomes a
grouped convolution: slow, and wrong where the compiler partitions it over devices.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from gradnorm_jax.jaxprs import Rule, body, eval_jaxpr, everywhere, own_rule, shape_of

Parameters = dict[str, Any]
"""Of `lax.conv_general_dilated_p`, as an equation of a jaxpr holds them."""

Array = jax.Array | jax.ShapeDtypeStruct

Means = Callable[[Parameters, jax.Array, jax.Array], jax.Array]
"""`(parameters, lhs, rhs) -> result` of a convolution."""

_MANY_OFFSETS = 64
"""As many products take seconds to compile, once for each layer and derivative."""


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
    """The convolution, on CPUs by other means where these are faster: see `means_on_cpu`."""
    plain = functools.partial(lax.conv_general_dilated_p.bind, **parameters)
    means = means_on_cpu(lhs, rhs, parameters)
    if means is None:
        return plain(lhs, rhs)
    # Differentiated, the shifted inputs are made again: kept, they are as many as the offsets.
    recomputed = jax.checkpoint(functools.partial(means, parameters), prevent_cse=False)
    return lax.platform_dependent(lhs, rhs, cpu=recomputed, default=plain)


def means_on_cpu(lhs: Array, rhs: Array, parameters: Parameters) -> Means | None:
    """How to do a convolution in groups, for which XLA for CPUs takes 3 to 40 times as long.

    Where each channel is a group it is a sum of products, for kernels of usual size; otherwise it
    is one convolution after another.
    """
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    real = all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in (lhs, rhs))
    if groups == 1 or parameters["batch_group_count"] > 1 or not real:
        return None
    if lhs.shape[numbers.lhs_spec[1]] > groups:
        return _group_by_group
    offsets = math.prod(rhs.shape[axis] for axis in numbers.rhs_spec[2:])
    return _sum_of_products if offsets <= _MANY_OFFSETS else None


def lower_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its convolutions in groups done by `convolve`, wherever they are in it."""

    @functools.wraps(function)
    def lowered(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = eval_jaxpr(program, grouped_rule, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return lowered


def grouped_rule(equation: core.JaxprEqn) -> Rule | None:
    """The rule `convolve` for convolutions in groups, those in loops and branches included."""
    return everywhere(_convolve_rule)(equation)


def _convolve_rule(equation: core.JaxprEqn) -> Rule | None:
    if equation.primitive.name != "conv_general_dilated":
        return None
    lhs, rhs = map(shape_of, equation.invars)
    if means_on_cpu(lhs, rhs, equation.params) is None:
        return None
    return functools.partial(convolve, parameters=equation.params)


def plain_rule(equation: core.JaxprEqn) -> Rule | None:
    """The convolution itself in place of what `convolve` made of it, None for all else."""
    choice = equation.primitive.name == "cond" and equation.params.get("branches_platforms")
    default = body(equation.params["branches"][-1]).eqns if choice else []
    if [each.primitive.name for each in default] != ["conv_general_dilated"]:
        return None
    return lambda index, *operands: [own_rule(default[0])(*operands)]


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
    x, geometry = _channels_last(lhs, rhs, parameters)
    g = _result_channels_last(cotangent, parameters)
    groups, precision = parameters["feature_group_count"], parameters["precision"]
    if groups > 1:
        product = functools.partial(_grouped_product, groups=groups, precision=precision)
    else:
        product = functools.partial(_product, precision=precision)
    if groups == 1 and (joined or _is_thin(geometry, x, g)):
        gradient = product(_patches(x, geometry), g)
    else:
        gradient = _each_offset(x, geometry, lambda view: product(view, g))
    gradient = gradient.reshape(*geometry.kernel, x.shape[-1] // groups, g.shape[-1])
    output, channel, *space = parameters["dimension_numbers"].rhs_spec
    return gradient.transpose(np.argsort([*space, channel, output])).astype(rhs.dtype)


def as_matrices(
    lhs: jax.Array, rhs: Array, cotangent: jax.Array, parameters: Parameters
) -> tuple[jax.Array, jax.Array]:
    """X `[R, K]` and G `[R, O]` such that the kernel's gradient holds the entries of X^T G.

    R counts output positions, K the weights of one output. For convolutions without groups.
    """
    x, geometry = _channels_last(lhs, rhs, parameters)
    g = _result_channels_last(cotangent, parameters)
    g = g.reshape(-1, g.shape[-1])
    return _patches(x, geometry).reshape(len(g), -1), g


def _group_by_group(parameters: Parameters, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution of several groups of several channels."""
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]

    def split(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def convolve_group(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        params = parameters | {"feature_group_count": 1}
        result: jax.Array = lax.conv_general_dilated_p.bind(*operands, **params)
        return result

    y = lax.map(convolve_group, (split(lhs, numbers.lhs_spec[1]), split(rhs, numbers.rhs_spec[0])))
    channel = numbers.out_spec[1]
    y = jnp.moveaxis(y, 0, channel)
    return y.reshape(*y.shape[:channel], -1, *y.shape[channel + 2 :])


def _sum_of_products(parameters: Parameters, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution of each channel by itself."""
    numbers = parameters["dimension_numbers"]
    x, geometry = _channels_last(lhs, rhs, parameters)
    x = x.astype(np.promote_types(x.dtype, np.float32))
    output, channel, *space = numbers.rhs_spec
    ones, channels = (1 for _ in x.shape[:-1]), x.shape[-1]
    # Several outputs of one channel stand beside each other.
    kernel = rhs.astype(x.dtype).transpose(*space, channel, output)
    kernel = kernel.reshape(-1, *ones, channels, kernel.shape[-1] // channels)
    views = (view[..., None] for view in _views(x, geometry))
    y = functools.reduce(jnp.add, map(jnp.multiply, views, kernel))
    y = y.reshape(*y.shape[:-2], -1)
    batch, channel, *space = numbers.out_spec
    y = y.transpose(np.argsort([batch, *space, channel]))
    return y.astype(parameters["preferred_element_type"] or lhs.dtype)


def _channels_last(
    lhs: jax.Array, rhs: Array, parameters: Parameters
) -> tuple[jax.Array, Geometry]:
    numbers = parameters["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    x = lhs.transpose(batch, *space, channel)
    kernel = np.asarray([rhs.shape[axis] for axis in numbers.rhs_spec[2:]])
    dilation, strides = parameters["rhs_dilation"], parameters["window_strides"]
    pairs = zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    padding = tuple((low, high, spacing - 1) for (low, high), spacing in pairs)
    low, high, interior = np.transpose(padding)
    size = np.asarray(x.shape[1:-1])
    room = low + high + size + interior * np.maximum(size - 1, 0)
    window = (kernel - 1) * dilation + 1
    output = np.maximum((room - window) // strides + 1, 0)
    return x, Geometry(tuple(kernel.tolist()), tuple(output.tolist()), strides, dilation, padding)


def _result_channels_last(result: jax.Array, parameters: Parameters) -> jax.Array:
    batch, channel, *space = parameters["dimension_numbers"].out_spec
    return result.transpose(batch, *space, channel)


def _views(x: jax.Array, geometry: Geometry) -> Iterator[jax.Array]:
    """The input under one offset of the kernel after the other, `[N, *output, C]`."""
    padded = _padded(x, geometry)
    size = _extent(padded, geometry)
    for offset in _offsets(geometry).tolist():
        stop = np.add(offset, size).tolist()
        yield lax.slice(padded, offset, stop, (1, *geometry.strides, 1))


def _each_offset(
    x: jax.Array, geometry: Geometry, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`function` of the input under each offset of the kernel, `[offsets, ...]`.

    In a loop: unrolled, each offset would be compiled by itself, in every layer.
    """
    view, offsets = _view_at(x, geometry), _offsets(geometry)
    if len(offsets) == 1:
        return function(view(offsets[0]))[None]
    return lax.map(lambda offset: function(view(offset)), offsets)


def _patches(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The input under all offsets of the kernel, `[N, *output, offsets * C]`; also in a loop."""
    view, offsets = _view_at(x, geometry), _offsets(geometry)
    first = view(offsets[0])

    def put(number: jax.Array, patches: jax.Array) -> jax.Array:
        part = view(jnp.asarray(offsets)[number])
        return lax.dynamic_update_index_in_dim(patches, part, number, axis=-2)

    shape = (*first.shape[:-1], len(offsets), first.shape[-1])
    patches = jnp.broadcast_to(first[..., None, :], shape)
    return lax.fori_loop(1, len(offsets), put, patches).reshape(*first.shape[:-1], -1)


def _view_at(x: jax.Array, geometry: Geometry) -> Callable[[jax.Array], jax.Array]:
    padded = _padded(x, geometry)
    size = _extent(padded, geometry)

    def view(offset: jax.Array) -> jax.Array:
        every = lax.dynamic_slice(padded, offset, size)
        return lax.slice(every, [0] * every.ndim, size, (1, *geometry.strides, 1))

    return view


def _padded(x: jax.Array, geometry: Geometry) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *geometry.padding, (0, 0, 0)))


def _offsets(geometry: Geometry) -> np.ndarray:
    """Where the view of each entry of the kernel begins, `[offsets, axes of the input]`."""
    indices = list(itertools.product([0], *map(range, geometry.kernel), [0]))
    return np.multiply(indices, (1, *geometry.dilation, 1)).astype(np.int32)


def _extent(padded: jax.Array, geometry: Geometry) -> list[int]:
    """Of a view, before all but every so many of its entries are left out."""
    space = np.multiply(np.subtract(geometry.output, 1), geometry.strides) + 1
    return [padded.shape[0], *space.tolist(), padded.shape[-1]]


def _is_thin(geometry: Geometry, x: jax.Array, g: jax.Array) -> bool:
    """Whether the products of single offsets would be slow: of few channels, or few positions."""
    return x.shape[-1] < 16 or math.prod(geometry.output) <= g.shape[-1]


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
