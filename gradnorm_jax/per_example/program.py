"""The loss of one example as a program of primitives that can be evaluated by other rules."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gradnorm_jax.per_example.convolution import convolve
from gradnorm_jax.types import Params

Program = Any
"""A closed jaxpr, whose type differs between versions of JAX."""

Rule = Callable[..., Any]
"""`(*operands) -> result`, in place of what one equation does."""

_CALLED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Primitives that do nothing but call a program, and the parameter that holds it."""


def trace_loss(loss_fn: Callable[..., jax.Array], params: Params, example: Any) -> Program:
    """The program `(loss_fn's arrays, params, example) -> loss` with all calls inlined.

    Raises:
        TypeError: the loss of a batch of one is not a real array of shape `[1]`.
    """

    def loss(loss_fn: Callable[..., jax.Array], params: Params, example: Any) -> jax.Array:
        losses = loss_fn(params, jax.tree.map(lambda x: x[None], example))
        shape, dtype = getattr(losses, "shape", None), getattr(losses, "dtype", np.dtype(object))
        if shape != (1,) or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                "loss_fn(params, batch) must return real losses of shape [B], nothing beside them; "
                f"for a batch of one example it returned {jax.tree.map(jax.typeof, losses)}"
            )
        return losses[0]

    operands = jax.tree.leaves((loss_fn, params, example))
    program = jax.make_jaxpr(loss)(loss_fn, params, example)
    return jax.make_jaxpr(lambda *operands: _inline(program, *operands))(*operands)


def evaluate(
    program: Program,
    rule_for: Callable[[core.JaxprEqn], Rule | None],
    *operands: Any,
    results: Sequence[core.Var] | None = None,
) -> list[Any]:
    """What the program computes, each equation done by `rule_for(equation)` if that is not None.

    Args:
        program: a closed jaxpr.
        rule_for: the rule for an equation; None for its own.
        *operands: of the program; those at the end that no result needs may be left out.
        results: variables of the program to compute in place of its results.
    """
    jaxpr = body(program)
    wanted = list(jaxpr.outvars if results is None else results)
    values = dict(zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True))
    values.update(zip(jaxpr.invars, operands, strict=False))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    # A part of the program is computed beside the whole, which does what more there is to do.
    for equation in _needed(jaxpr, wanted, effects=results is None):
        rule = rule_for(equation) or _own_rule(equation)
        outputs = rule(*map(read, equation.invars))
        if not equation.primitive.multiple_results:
            outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in wanted]


def batchable_rule(equation: core.JaxprEqn) -> Rule | None:
    """Rules under which gradients batch well: that of `convolve`, wherever there is one."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" and params["batch_group_count"] == 1:
        return lambda lhs, rhs: convolve(lhs, rhs, params)
    if not any(map(_has_convolution, inner_programs(equation))):
        return None
    if name == "remat2":
        rewritten = jax.checkpoint(
            lambda *operands: evaluate(params["jaxpr"], batchable_rule, *operands),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        return rewritten
    if name == "cond":
        branches = tuple(map(_rewrite, params["branches"]))
        return lambda *operands: equation.primitive.bind(
            *operands, **{**params, "branches": branches}
        )
    if name == "scan":
        loop = _rewrite(params["jaxpr"])
        return lambda *operands: equation.primitive.bind(*operands, **{**params, "jaxpr": loop})
    return None


def inner_programs(equation: core.JaxprEqn) -> list[Program]:
    """The programs that an equation holds as parameters: a loop's body, branches."""
    values = [
        item
        for value in equation.params.values()
        for item in (value if isinstance(value, tuple) else (value,))
    ]
    return [value for value in values if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def body(program: Program) -> core.Jaxpr:
    """The jaxpr without its constants."""
    return cast(core.Jaxpr, getattr(program, "jaxpr", program))


def shape_of(variable: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of a variable of a program."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def convolutions(program: Program) -> list[core.JaxprEqn]:
    """All equations that convolve, those of inner programs included."""
    found = []
    for equation in body(program).eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(equation)
        for inner in inner_programs(equation):
            found.extend(convolutions(inner))
    return found


def _has_convolution(program: Program) -> bool:
    return bool(convolutions(program))


def _needed(jaxpr: core.Jaxpr, results: Sequence[Any], *, effects: bool) -> list[core.JaxprEqn]:
    """The equations that the results depend on, or that do more than compute, in order."""
    wanted = {atom for atom in results if isinstance(atom, core.Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if (effects and equation.effects) or not wanted.isdisjoint(equation.outvars):
            kept.append(equation)
            wanted.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return kept[::-1]


def _own_rule(equation: core.JaxprEqn) -> Rule:
    def bind(*operands: Any) -> Any:
        with equation.ctx.manager:
            params = equation.primitive.get_bind_params(equation.params)
            return equation.primitive.bind(*operands, **params)

    return bind


def _inline(program: Program, *operands: Any) -> list[Any]:
    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        called = _CALLED.get(equation.primitive.name)
        if called is None:
            return None
        return lambda *operands: _inline(equation.params[called], *operands)

    return evaluate(program, rule_for, *operands)


def _rewrite(program: Program) -> Program:
    """The same program, by rules under which its gradients batch well."""
    inputs = [variable.aval for variable in body(program).invars]
    return jax.make_jaxpr(lambda *operands: evaluate(program, batchable_rule, *operands))(*inputs)
