"""Arrays that lie in pieces on several devices, put together for one operation at a time."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend import core

from gradnorm_jax.ordering import after

Shared = TypeVar("Shared")
Batch = TypeVar("Batch")
Out = TypeVar("Out")

_CALLS = ("jit", "pjit")
"""What versions of JAX call the primitive that does nothing but call a program."""


class _Late(NamedTuple):
    """A value that does not depend on the batch, computed anew for each operation that needs it.

    Attributes:
        rule: `(operands, *inputs) -> outputs`, of which only gathers look at the operation's other
            operands.
        inputs: other such values.
        output: which of the outputs this value is.
    """

    rule: Callable[..., Sequence[Any]]
    inputs: Sequence["_Late"] = ()
    output: int = 0


def gather_late(
    function: Callable[[Shared, Batch], Out], gathers: Any
) -> Callable[[Shared, Batch], Out]:
    """`function(shared, batch)` of the pieces of `shared`, which are gathered when they are used.

    An operation that combines something of the batch with shared arrays, or with what follows from
    them alone (a standardised kernel, say), has these made for itself: gathered once its other
    operands are computed, and dropped thereafter. So a backward pass gathers again what the forward
    pass had gathered. A loop, a branch and a `jax.checkpoint` are one operation each.

    Args:
        function: pure.
        gathers: a tree like `shared` of functions that make a whole array of a device's piece.
    """

    def of_pieces(pieces: Shared, batch: Batch) -> Out:
        whole = jax.eval_shape(lambda: jax.tree.map(lambda g, x: g(x), gathers, pieces))
        program, results = jax.make_jaxpr(function, return_shape=True)(whole, batch)
        shared = map(_gathered, jax.tree.leaves(gathers), jax.tree.leaves(pieces))
        outputs = _evaluate(program, [*shared, *jax.tree.leaves(batch)])
        return jax.tree.unflatten(jax.tree.structure(results), _compute(outputs))

    return of_pieces


def _gathered(gather: Callable[[jax.Array], jax.Array], piece: jax.Array) -> _Late:
    def rule(operands: Sequence[jax.Array]) -> list[jax.Array]:
        return [gather(after(piece, operands))]

    return _Late(rule)


def _constant(value: Any) -> _Late:
    return _Late(lambda operands: [value])


def _evaluate(program: Any, operands: Iterable[Any]) -> list[Any]:
    """What a closed jaxpr computes; all that does not depend on the batch is left for later."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, map(_constant, program.consts), strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return _constant(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = list(map(read, equation.invars))
        if equation.primitive.name in _CALLS:
            outputs = _evaluate(equation.params["jaxpr"], inputs)
        elif all(isinstance(x, _Late) for x in inputs):
            rule = functools.partial(_apply_late, equation)
            outputs = [_Late(rule, inputs, output) for output in range(len(equation.outvars))]
        else:
            outputs = _apply(equation, _compute(inputs))
        values.update(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def _compute(values: Sequence[Any]) -> list[Any]:
    """The values of one operation's operands, with those made that have been left for later."""
    others = [x for x in values if not isinstance(x, _Late)]
    made: dict[Any, Sequence[Any]] = {}

    def make(value: Any) -> Any:
        if not isinstance(value, _Late):
            return value
        if value.rule not in made:
            made[value.rule] = value.rule(others, *map(make, value.inputs))
        return made[value.rule][value.output]

    return list(map(make, values))


def _apply_late(equation: core.JaxprEqn, operands: Any, *inputs: Any) -> list[Any]:
    return _apply(equation, inputs)


def _apply(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    with equation.ctx.manager:
        params = equation.primitive.get_bind_params(equation.params)
        outputs: Any = equation.primitive.bind(*inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]
