"""Equations that move or cast the entries of an array and leave them as they are otherwise."""

import math
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax.extend import core

from gradnorm_jax.adapters.frames import Ref
from gradnorm_jax.jaxprs import shape_of
from gradnorm_jax.types import Step

_KEEP_ENTRIES = {
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "layout_constraint",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
_KEEP_ALL_OR_FEWER = {"broadcast_in_dim", "dynamic_slice", "slice"}
"""Primitives that keep the entries and their order if there are as many afterwards."""


def keeps_entries(ref: Ref) -> int | None:
    """The operand whose entries a value holds, in whatever order; None if it holds others."""
    equation = ref.equation
    if equation is None:
        return None
    name = equation.primitive.name
    if name in _KEEP_ALL_OR_FEWER:
        same_size = math.prod(ref.shape) == math.prod(_operand_shape(equation))
        return 0 if same_size else None
    if name not in _KEEP_ENTRIES or not jnp.issubdtype(ref.atom.aval.dtype, jnp.floating):
        return None
    return equation.outvars.index(ref.atom) if name == "optimization_barrier" else 0


def swaps_axes(equation: core.JaxprEqn) -> bool | None:
    """Whether a matrix, which may have axes of length one, is transposed; None if more happens."""
    if equation.primitive.name != "transpose":
        return False
    order = _order_of_long_axes(_operand_shape(equation), equation.params["permutation"])
    if order == sorted(order):
        return False
    return True if len(order) == 2 else None


def step_of(ref: Ref) -> list[Step]:
    """What an equation that keeps entries does to their order and shape; nothing for a cast."""
    equation = ref.equation
    assert equation is not None
    if equation.primitive.name == "transpose":
        return [("transpose", tuple(equation.params["permutation"]))]
    return [] if ref.shape == _operand_shape(equation) else [("reshape", ref.shape)]


def reduce_steps(shape: Sequence[int], steps: Iterable[Step]) -> tuple[Step, ...]:
    """The fewest steps that lead from a leaf to the same kernel `[..., D, C]`.

    Args:
        shape: of the leaf.
        steps: the last of which makes it `[D, C]`.
    """
    shapes: list[tuple[int, ...]] = [tuple(shape)]
    kept: list[Step] = []
    for name, argument in steps:
        before = shapes[-1]
        after = tuple(before[i] for i in argument) if name == "transpose" else argument
        if name == "transpose":
            order = _order_of_long_axes(before, argument)
            name, argument = ("reshape", after) if order == sorted(order) else (name, argument)
        if kept and kept[-1][0] == name:
            earlier = kept.pop()[1]
            shapes.pop()
            if name == "transpose":
                argument = tuple(earlier[i] for i in argument)
        if after == shapes[-1] and (name == "reshape" or argument == tuple(range(len(after)))):
            continue
        kept.append((name, argument))
        shapes.append(after)
    if kept and kept[-1][0] == "reshape" and shapes[-2][-1:] == shapes[-1][-1:]:
        kept.pop()
    return tuple(kept)


def _operand_shape(equation: core.JaxprEqn) -> tuple[int, ...]:
    return shape_of(equation.invars[0]).shape


def _order_of_long_axes(shape: Sequence[int], permutation: Sequence[int]) -> list[int]:
    return [axis for axis in permutation if shape[axis] != 1]
