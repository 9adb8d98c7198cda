"""Layers that multiply by a kernel, and the norm of one example's gradient of that kernel.

A kernel enters the loss of an example through one product, a convolution or a `dot_general`. Of
rows X `[R, K]`, R positions and K weights that each output sums over, and of their cotangents G
`[R, O]` its gradient is X^T G, which is formed for a few examples at a time, pulled back to the
parameter that the kernel is made of, and reduced to a norm at once. Sometimes it need not be
formed: with a single row it is an outer product, and each of its entrywise norms is the product of
two norms; with few rows its 2-norm follows from two Gram matrices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from gradnorm_jax import convolution, kernel_gradients
from gradnorm_jax.jaxprs import shape_of
from gradnorm_jax.norms import Orders, entrywise_norm, power
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.per_example.analysis import ParameterUse
from gradnorm_jax.per_example.ordering import after
from gradnorm_jax.per_example.placement import as_varying
from gradnorm_jax.per_example.turns import in_turns
from gradnorm_jax.windows import count_offsets

Sources = tuple[jax.Array, ...]
"""What a kernel is made of, the parameter the first."""

Norm = Callable[[jax.Array, jax.Array, Sources], jax.Array]
"""`(other operand, cotangent of the product, sources) -> norm []`, of K orders `[K]`."""

_FEW_BYTES = 4 * 2**20
"""What a processor's cache holds beside everything else."""

_COPIES = 4
"""Of what is pulled back, one for each step on the way to the parameter's gradient."""

_MANY_BYTES = 256 * 2**20
"""What an accelerator's memory holds beside everything else."""


def is_product(entry: ParameterUse) -> bool:
    """Whether the parameter enters through a product of real numbers that this module knows."""
    params = entry.equation.params
    variables = [*entry.equation.invars, *entry.equation.outvars]
    if not all(jnp.issubdtype(shape_of(v).dtype, jnp.floating) for v in variables):
        return False
    match entry.equation.primitive.name:
        case "dot_general":
            return not params["dimension_numbers"][1][entry.position]
        case "conv_general_dilated":
            return entry.position == 1 and params["batch_group_count"] == 1
    return False


def with_norm_probe(entry: ParameterUse, norm: Norm) -> Callable[..., jax.Array]:
    """The product with a further operand whose cotangent is a norm.

    Args:
        entry: the product, and which operand of it is the kernel.
        norm: of the kernel's gradient, or of that of the parameter it is made of.

    Returns:
        `(lhs, rhs, sources, probe) -> result`: the equation's own result, whatever `probe`, which
        is of the norm's shape. The cotangents of the kernel and of its sources are left out (zero).
    """
    other_at = 1 - entry.position

    @jax.custom_vjp
    def product(lhs: jax.Array, rhs: jax.Array, sources: Sources, probe: jax.Array) -> jax.Array:
        return multiply(entry, lhs, rhs)

    def forward(*operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        # The plain product: by `product`, a second derivative would leave out the kernel's part.
        return multiply(entry, *operands[:2]), operands

    def backward(saved: tuple[Any, ...], cotangent: jax.Array) -> tuple[Any, ...]:
        *operands, sources, probe = saved
        # The norm comes first: then what it needs is not kept until the end of the program.
        measurement = norm(operands[other_at], cotangent, sources).astype(probe.dtype)
        cotangent, measurement = lax.optimization_barrier((cotangent, measurement))
        of_operands = [jnp.zeros_like(operand) for operand in operands]
        of_operands[other_at] = _transpose(entry, operands, other_at, cotangent)
        return *of_operands, None, measurement

    product.defvjp(forward, backward)
    return product


def norm_without_gradient(entry: ParameterUse, *, ord: Orders) -> Norm | None:
    """The norm of X^T G from X and G alone, if this is possible for all orders and cheaper."""
    params = entry.equation.params
    if params.get("feature_group_count", 1) > 1:
        return None
    rows, fan_in, fan_out = sizes(entry)
    # The factor of two pays for the scaling, and for what small matrices lose in speed.
    few_rows = 2 * rows * (fan_in + fan_out) <= fan_in * fan_out
    if not (rows == 1 or (few_rows and np.all(np.equal(ord, 2)))):
        return None

    def norm(other: jax.Array, cotangent: jax.Array, sources: Sources) -> jax.Array:
        return product_norm(*matrices(entry, other, cotangent), ord=ord)

    return norm


def norm_by_gradient(
    entry: ParameterUse,
    make_kernel: Callable[..., jax.Array] | None,
    *,
    ord: Orders,
    in_turn: bool,
) -> Norm:
    """The norm of the gradient of the parameter that `make_kernel` makes the kernel of, and others.

    It is None for a parameter whose entries are the kernel's, in whatever order.

    If `in_turn`, the gradients of a few examples are made at a time, so that they stay in the
    cache: otherwise each step on the way to the norm reads all of them from memory. Taking turns is
    not for examples that a compiler spreads over devices.
    """
    copies = 1 if make_kernel is None else _COPIES

    def norm_by(*sources: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        gradient_of = _entries_of_gradient(entry)
        if make_kernel is not None:
            gradient_of = _pulled_back(entry, make_kernel, *sources)
        return lambda *pair: entrywise_norm(gradient_of(*pair)[None], ord=ord)[0]

    @custom_vmap
    def norm(other: jax.Array, cotangent: jax.Array, sources: Sources) -> jax.Array:
        return norm_by(*sources)(other, cotangent)

    # A rule may be used when its surroundings are no longer traced: all arrays are its operands.
    @norm.def_vmap
    def norms(size: int, batched: list[Any], *operands: Any) -> tuple[jax.Array, bool]:
        *pair, sources = operands
        if any(batched[2]):
            axes = jax.tree.map(lambda has_examples: 0 if has_examples else None, tuple(batched))
            return jax.vmap(lambda x, g, s: norm_by(*s)(x, g), axes)(*operands), True
        examples = [
            operand if has_examples else jnp.broadcast_to(operand, (size, *operand.shape))
            for operand, has_examples in zip(pair, batched, strict=False)
        ]
        # Made again now, the kernel's intermediate values need not be kept from the forward pass.
        norm = norm_by(after(sources[0], examples[1]), *sources[1:])
        step = turn_size(entry, size, copies=copies) if in_turn else size
        if step == size:
            return jax.vmap(norm)(*examples), True
        return in_turns(norm, examples, _batch_axes(entry), step), True

    return norm


def product_norm(x: jax.Array, g: jax.Array, *, ord: Orders) -> jax.Array:
    """Entrywise norm `[]` of X^T G for X `[R, K]` and G `[R, O]`, R = 1 or all of `ord` 2."""
    if len(x) == 1:
        return (entrywise_norm(x, ord=ord) * entrywise_norm(g, ord=ord))[0]
    x, x_scale = _scaled(x)
    g, g_scale = _scaled(g)
    # Rows that have much in common make large Gram matrices of which little is left in the end.
    # Without their mean m, X^T G is that of what remains, and m s^T, s being the sum of G's rows.
    common, summed = x.mean(axis=0), g.sum(axis=0)
    x = x - common[None]
    gram = _dot(x, x.T) * _dot(g, g.T)
    mixed = _dot(x, common) * _dot(g, summed)
    square = gram.sum() + 2 * mixed.sum() + _dot(common, common) * _dot(summed, summed)
    norm = power(jnp.maximum(square, 0), 0.5) * x_scale * g_scale
    return jnp.broadcast_to(norm, np.shape(ord))


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = to_float32_at_least(x)
    largest = jnp.abs(x).max()
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return x / scale, scale


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def multiply(entry: ParameterUse, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product itself."""
    if entry.equation.primitive.name == "conv_general_dilated":
        return convolution.convolve(lhs, rhs, entry.equation.params)
    return entry.equation.primitive.bind(lhs, rhs, **entry.equation.params)


def _transpose(
    entry: ParameterUse, operands: Any, position: int, cotangent: jax.Array
) -> jax.Array:
    """Cotangent of the operand at `position`, of which only the shape and type matter."""

    def product(operand: jax.Array) -> jax.Array:
        return multiply(entry, *(operand if i == position else operands[i] for i in range(2)))

    (gradient,) = jax.linear_transpose(product, operands[position])(cotangent)
    return gradient


def kernel_gradient_of(entry: ParameterUse, other: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient of one example, of the kernel's shape and type."""
    kernel, params = shape_of(entry.variable), entry.equation.params
    if entry.equation.primitive.name == "conv_general_dilated":
        return kernel_gradients.kernel_gradient(other, kernel, cotangent, params, joined=True)
    # As much its own on each device as the cotangent, or its gradient would be summed over devices.
    kernel = as_varying(jnp.zeros(kernel.shape, kernel.dtype))
    operands = (kernel, other) if entry.position == 0 else (other, kernel)
    return _transpose(entry, operands, entry.position, cotangent)


def _entries_of_gradient(entry: ParameterUse) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`kernel_gradient_of`, but its entries may be in any order."""
    if entry.equation.primitive.name != "conv_general_dilated":
        return functools.partial(kernel_gradient_of, entry)
    kernel, parameters = shape_of(entry.variable), entry.equation.params
    return lambda x, g: kernel_gradients.kernel_gradient_entries(x, kernel, g, parameters)


def _pulled_back(
    entry: ParameterUse,
    make_kernel: Callable[..., jax.Array],
    parameter: jax.Array,
    *others: jax.Array,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`kernel_gradient_of`, but of the parameter that the kernel is made of."""
    _, pull_back = jax.vjp(lambda parameter: make_kernel(parameter, *others), parameter)

    def gradient_of(other: jax.Array, cotangent: jax.Array) -> jax.Array:
        (gradient,) = pull_back(kernel_gradient_of(entry, other, cotangent))
        return gradient

    return gradient_of


def turn_size(entry: ParameterUse, size: int, *, copies: int = 1) -> int:
    """How many examples of `size` to take at a time, without a remainder, to be compiled too.

    On CPUs not all of them, unless the kernel is 1 x 1: what is not in a loop is fused with what
    comes before, and that computed again for every shift of a convolution's input; and dense layers
    take longer to compile and to run. Accelerators wait for each turn of a loop.
    """
    most = size // 2 if _on_cpu() and not _is_pointwise(entry) else size
    at_once = max(1, min(_examples_at_once(entry) // copies, most))
    return max(step for step in range(1, at_once + 1) if size % step == 0)


def _is_pointwise(entry: ParameterUse) -> bool:
    """Whether it is a convolution with a kernel of 1 x 1."""
    if entry.equation.primitive.name != "conv_general_dilated":
        return False
    return count_offsets(shape_of(entry.variable), entry.equation.params) == 1


def _batch_axes(entry: ParameterUse) -> tuple[int | None, int | None]:
    """The axes of a convolution's input and result along which it takes a batch."""
    if entry.equation.primitive.name == "dot_general":
        return None, None
    numbers = entry.equation.params["dimension_numbers"]
    return numbers.lhs_spec[0], numbers.out_spec[0]


def _examples_at_once(entry: ParameterUse) -> int:
    """Of how many examples the factors and gradients fit into fast memory."""
    rows, fan_in, fan_out = sizes(entry)
    of_factors, params = rows * fan_in, entry.equation.params
    if params.get("feature_group_count") == 1:
        lhs, rhs = map(shape_of, entry.equation.invars)
        of_factors = kernel_gradients.count_entries_of_factors(lhs, rhs, params)
    size = (of_factors + fan_in * fan_out) * shape_of(entry.variable).dtype.itemsize
    return fast_memory() // max(1, size)


def fast_memory() -> int:
    """How many bytes are fast to write and to read again."""
    return _FEW_BYTES if _on_cpu() else _MANY_BYTES


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def sizes(entry: ParameterUse) -> tuple[int, int, int]:
    """R, K and O."""
    kernel, params = shape_of(entry.variable), entry.equation.params
    if entry.equation.primitive.name == "conv_general_dilated":
        fan_out = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    else:
        contracting = params["dimension_numbers"][0][entry.position]
        fan_out = kernel.size // math.prod(kernel.shape[axis] for axis in contracting)
    rows = math.prod(shape_of(entry.equation.outvars[0]).shape) // max(1, fan_out)
    return rows, kernel.size // max(1, fan_out), fan_out


def matrices(
    entry: ParameterUse, other: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """X `[R, K]` and G `[R, O]` of a product without groups."""
    params = entry.equation.params
    if entry.equation.primitive.name == "conv_general_dilated":
        return kernel_gradients.as_matrices(other, shape_of(entry.variable), cotangent, params)
    contracting = params["dimension_numbers"][0][1 - entry.position]
    free = [axis for axis in range(other.ndim) if axis not in contracting]
    rows, fan_in, _ = sizes(entry)
    x = other.transpose(*free, *contracting).reshape(rows, fan_in)
    g = cotangent.reshape(-1, rows).T if entry.position == 0 else cotangent.reshape(rows, -1)
    return x, g
