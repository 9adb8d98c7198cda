"""Convolutions by means that are faster on CPUs.

With many channels it is one product of matrices, of the input under each offset (a, b) in the
kernel, side by side, and the kernel: with a kernel of 1 x 1 the input as it is. A depthwise
convolution is a sum of products, one for every offset, channel by channel:

    y[h, w, i] = sum_{a, b} x[h + a, w + b, i] K[a, b, i]
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from gradnorm_jax.jaxprs import Rule, body, eval_jaxpr, everywhere, own_rule, shape_of
from gradnorm_jax.windows import (
    Array,
    Parameters,
    channels_last,
    count_offsets,
    geometry_of,
    views,
)

Means = Callable[[Parameters, jax.Array, jax.Array], jax.Array]
"""`(parameters, lhs, rhs) -> result` of a convolution."""

_MANY_OFFSETS = 64
"""As many products take seconds to compile, once for each layer and derivative."""

_MANY_CHANNELS = 256
"""With as many, in and out, copies of the input cost little beside the product."""

_FEW_POSITIONS = 256
"""The copies of an image with no more, one for each offset, stay small."""

_FEW_OFFSETS = 9
"""As many copies take little to compile."""


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
    """How to do a convolution for which XLA for CPUs takes longer; None where it does not.

    In groups it takes 3 to 40 times as long. Where each channel is a group it is a sum of products
    here, for kernels of usual size; otherwise it is one convolution after another. Without groups
    it takes 1.1 to 3 times as long as a product of matrices, and in bfloat16 2 to 6 times.
    """
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    real = all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in (lhs, rhs))
    if parameters["batch_group_count"] > 1 or not real:
        return None
    if groups == 1:
        return _product_of_matrices if _is_cheap_to_copy(lhs, rhs, parameters) else None
    if lhs.shape[numbers.lhs_spec[1]] > groups:
        return _group_by_group
    return _sum_of_products if count_offsets(rhs, parameters) <= _MANY_OFFSETS else None


def _is_cheap_to_copy(lhs: Array, rhs: Array, parameters: Parameters) -> bool:
    """Whether the copies of the input, one for each offset, cost little beside the product."""
    offsets = count_offsets(rhs, parameters)
    if offsets == 1:
        return True
    channels = min(rhs.shape[axis] for axis in parameters["dimension_numbers"].rhs_spec[:2])
    if offsets > _FEW_OFFSETS or channels < _MANY_CHANNELS:
        return False
    return math.prod(geometry_of(lhs, rhs, parameters).output) <= _FEW_POSITIONS


def lower_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its convolutions done by `convolve`, wherever they are in it."""

    @functools.wraps(function)
    def lowered(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = eval_jaxpr(program, faster_rule, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return lowered


def faster_rule(equation: core.JaxprEqn) -> Rule | None:
    """The rule `convolve` where it has other means, in loops and branches too."""
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


def _product_of_matrices(parameters: Parameters, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution without groups."""
    x, geometry = channels_last(lhs, rhs, parameters)
    output, channel, *space = parameters["dimension_numbers"].rhs_spec
    kernel = rhs.transpose(*space, channel, output).reshape(-1, rhs.shape[output])
    y = lax.dot_general(
        jnp.concatenate([*views(x, geometry)], axis=-1),
        kernel,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=parameters["precision"],
        preferred_element_type=np.promote_types(x.dtype, np.float32),
    )
    return _result(y, lhs, parameters)


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
    x, geometry = channels_last(lhs, rhs, parameters)
    x = x.astype(np.promote_types(x.dtype, np.float32))
    output, channel, *space = numbers.rhs_spec
    ones, channels = (1 for _ in x.shape[:-1]), x.shape[-1]
    # Several outputs of one channel stand beside each other.
    kernel = rhs.astype(x.dtype).transpose(*space, channel, output)
    kernel = kernel.reshape(-1, *ones, channels, kernel.shape[-1] // channels)
    shifted = (view[..., None] for view in views(x, geometry))
    y = functools.reduce(jnp.add, map(jnp.multiply, shifted, kernel))
    return _result(y.reshape(*y.shape[:-2], -1), lhs, parameters)


def _result(y: jax.Array, lhs: jax.Array, parameters: Parameters) -> jax.Array:
    """The result, given in the order `[N, *output, O]`."""
    batch, channel, *space = parameters["dimension_numbers"].out_spec
    y = y.transpose(np.argsort([batch, *space, channel]))
    return y.astype(parameters["preferred_element_type"] or lhs.dtype)
