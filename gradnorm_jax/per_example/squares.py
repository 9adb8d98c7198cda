"""Sums of the squares of all examples' gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from gradnorm_jax.jaxprs import Rule, eval_jaxpr, shape_of
from gradnorm_jax.numerics import to_common_float, to_float32_at_least
from gradnorm_jax.per_example.analysis import ParameterUse
from gradnorm_jax.per_example.api import LossFn
from gradnorm_jax.per_example.arguments import as_partial, check_batch
from gradnorm_jax.per_example.engine import (
    map_examples,
    microbatches,
    trace,
    warn_of_fallback,
)
from gradnorm_jax.per_example.factors import factor_function, plain_products
from gradnorm_jax.per_example.layers import kernel_gradient_of, sizes, turn_size
from gradnorm_jax.per_example.placement import (
    Placement,
    as_varying,
    find_placement,
    spread,
    zero_rows,
)
from gradnorm_jax.per_example.program import Loss
from gradnorm_jax.tree import Params, Select, selected_paths, tree_like


def squared_gradient_sums(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    select: Select = None,
    mask: ArrayLike | None = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Params:
    r"""The squares of every example's gradient, entry by entry, summed over the examples.

    .. math:: s = \sum_b (\nabla_\theta L(\theta, x_b))^2

    Sums of several batches add up to that of all. Of L = -log p(y | x), s divided by the number of
    examples is the diagonal of the empirical Fisher matrix where y are the labels, and an unbiased
    estimate of that of the Fisher matrix where y are drawn from the network's own p.

    A kernel that multiplies one row for each example has no gradient formed: of inputs X and
    cotangents G `[B, ...]` its sum is (X * X)^T (G * G). One that multiplies several has gradients
    formed for a few examples at a time. Of the other parameters those of a microbatch are formed,
    one parameter after another. The other guarantees, and the arguments and errors not told here,
    are those of `per_example_grad_norms`.

    >>> sums = squared_gradient_sums(loss_fn, params, images, microbatch_size=32)
    >>> fisher = jax.tree.map(lambda s: s / len(images), sums)

    Args:
        loss_fn: `(params, batch) -> [B]`.
        params: pytree of parameters.
        batch: pytree of arrays `[B, ...]`.
        select: which parameters.
        mask: `[B]` bool, false for padding, which adds nothing.
        microbatch_size: how many examples each device takes at a time.
        mesh: devices to split the batch over.

    Returns:
        A tree like `params`, >= 0, in float32 or in the parameter's type if that is wider; None for
        the parameters that are not selected.

    References:
        Dangel, Kunstner, Hennig (2020), "BackPACK: Packing more into backprop", SumGradSquared.
        https://arxiv.org/abs/1912.10985
    """
    sums = _sums(
        as_partial(loss_fn),
        params,
        batch,
        check_batch(batch, mask, microbatch_size),
        selected=selected_paths(params, select),
        microbatch_size=microbatch_size,
        placement=find_placement(batch, mesh),
    )
    return tree_like(params, sums)


@functools.partial(jax.jit, static_argnames=("selected", "microbatch_size", "placement"))
def _sums(
    loss_fn: jax.tree_util.Partial,
    params: Params,
    batch: Any,
    mask: jax.Array | None,
    *,
    selected: tuple[str, ...],
    microbatch_size: int | None,
    placement: Placement,
) -> dict[str, jax.Array]:
    def share_fn(shared: Any, rows: Any) -> dict[str, jax.Array]:
        loss_fn, params = as_varying(shared)
        loss = trace(loss_fn, params, rows[0], selected)
        warn_of_fallback(loss)
        entries = plain_products(loss)
        if not placement.known:  # no turns where the compiler spreads the examples over devices
            entries = {path: entry for path, entry in entries.items() if sizes(entry)[0] == 1}
        gradient_of = factor_function(loss, entries)

        def of_microbatch(rows: Any) -> dict[str, jax.Array]:
            batch, mask = rows
            found = map_examples(gradient_of, zero_rows(batch, mask), placement)
            return {
                path: _sum_of_squares(loss, path, entries.get(path), each)
                for path, each in zero_rows(found, mask).items()
            }

        zeros = as_varying({path: _zeros(loss.leaves[path]) for path in loss.selected})
        sums = _add_up(of_microbatch, rows, microbatch_size, zeros)
        return jax.tree.map(lambda x: x[None], sums)

    devices = 1 if placement.mesh is None else placement.mesh.size
    sums = spread(share_fn, placement)((loss_fn, params), (batch, _fill(mask, batch, devices)))
    return jax.tree.map(lambda x: x.sum(axis=0), sums)


def _fill(mask: jax.Array | None, batch: Any, multiple: int) -> jax.Array | None:
    """The mask of the batch once it is filled up to a multiple: false for what fills it."""
    size = len(jax.tree.leaves(batch)[0])
    if size % multiple == 0:
        return mask
    mask = jnp.ones(size, bool) if mask is None else mask
    return jnp.pad(mask, (0, -size % multiple))


def _add_up(function: Callable[[Any], Any], rows: Any, size: int | None, zeros: Any) -> Any:
    """The sum of `function` over microbatches, of the types of `zeros`."""
    batch, mask = rows
    if size is None or size >= len(jax.tree.leaves(batch)[0]):
        return function(rows)

    def add(total: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(rows)), None

    return lax.scan(add, zeros, microbatches((batch, _fill(mask, batch, size)), size))[0]


def _sum_of_squares(loss: Loss, path: str, entry: ParameterUse | None, found: Any) -> jax.Array:
    """Of gradients, or of their factors."""
    if entry is None:
        return jnp.square(to_float32_at_least(jnp.abs(found))).sum(axis=0)
    if sizes(entry)[0] == 1:
        sums = _product_of_squares(entry, *map(jnp.square, to_common_float(*found)))
    else:
        sums = _sum_in_turns(entry, found)
    leaf = loss.leaves[path]
    make_kernel = functools.partial(_make_kernel, loss, path, entry)
    (sums,) = jax.linear_transpose(make_kernel, jnp.zeros(leaf.shape, sums.dtype))(sums)
    return sums.astype(_zeros(leaf).dtype)


def _zeros(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    return to_float32_at_least(jnp.abs(jnp.zeros(leaf.shape, leaf.dtype)))


def _product_of_squares(entry: ParameterUse, others: jax.Array, cotangents: jax.Array) -> jax.Array:
    """The kernel's gradient for the squares of all examples' operands."""
    equation = entry.equation
    params = equation.params | {"preferred_element_type": None}

    def multiply(kernel: jax.Array) -> jax.Array:
        def multiply_one(other: jax.Array) -> Any:
            operands = (kernel, other) if entry.position == 0 else (other, kernel)
            return equation.primitive.bind(*operands, **params)

        return jax.vmap(multiply_one)(others)

    kernel = jnp.zeros(shape_of(entry.variable).shape, others.dtype)
    (gradient,) = jax.linear_transpose(multiply, as_varying(kernel))(cotangents)
    return gradient


def _sum_in_turns(entry: ParameterUse, factors: Any) -> jax.Array:
    """The sum for the kernel, of whose gradients a few are formed at a time."""

    def add(total: jax.Array, factors: Any) -> tuple[jax.Array, None]:
        gradients = jax.vmap(functools.partial(kernel_gradient_of, entry))(*factors)
        return total + jnp.square(to_float32_at_least(gradients)).sum(axis=0), None

    zeros = as_varying(_zeros(shape_of(entry.variable)))
    return lax.scan(add, zeros, microbatches(factors, turn_size(entry, len(factors[0]))))[0]


def _make_kernel(loss: Loss, path: str, entry: ParameterUse, leaf: jax.Array) -> jax.Array:
    """The leaf in the kernel's order, in its own type."""

    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        return _same if equation.primitive.name == "convert_element_type" else None

    operands = loss.operands({path: leaf}, None)
    (kernel,) = eval_jaxpr(loss.program, rule_for, *operands, results=[entry.variable])
    return kernel


def _same(x: jax.Array) -> jax.Array:
    return x
