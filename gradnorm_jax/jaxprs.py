"""Programs of primitives (jaxprs): the one interpreter, which can follow other rules."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax.extend import core

Program = Any
"""A closed jaxpr, whose type differs between versions of JAX."""

Rule = Callable[..., Any]
"""`(*operands) -> result`, in place of what one equation does."""

_CALLED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Primitives that do nothing but call a program, and the parameter that holds it."""

_CALLED_WITH_OWN_DERIVATIVE = {
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that call a program too, with a derivative or a use of memory of their own."""


def eval_jaxpr(
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
        rule = rule_for(equation) or own_rule(equation)
        outputs = rule(*map(read, equation.invars))
        if not equation.primitive.multiple_results:
            outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in wanted]


def inner_programs(equation: core.JaxprEqn) -> list[Program]:
    """The programs that an equation holds as parameters: a loop's body, branches."""
    values = [
        item
        for value in equation.params.values()
        for item in (value if isinstance(value, tuple) else (value,))
    ]
    return [value for value in values if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def called_program(equation: core.JaxprEqn) -> Program | None:
    """The program that an equation calls with its operands, and whose results are its own.

    None for anything that does more, such as a loop.
    """
    name = equation.primitive.name
    parameter = _CALLED.get(name) or _CALLED_WITH_OWN_DERIVATIVE.get(name)
    return None if parameter is None else equation.params[parameter]


def body(program: Program) -> core.Jaxpr:
    """The jaxpr without its constants."""
    return cast(core.Jaxpr, getattr(program, "jaxpr", program))


def shape_of(variable: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of a variable of a program."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _needed(jaxpr: core.Jaxpr, results: Sequence[Any], *, effects: bool) -> list[core.JaxprEqn]:
    """The equations that the results depend on, or that do more than compute, in order."""
    wanted = {atom for atom in results if isinstance(atom, core.Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if (effects and equation.effects) or not wanted.isdisjoint(equation.outvars):
            kept.append(equation)
            wanted.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return kept[::-1]


def own_rule(equation: core.JaxprEqn) -> Rule:
    """What the equation itself does."""

    def bind(*operands: Any) -> Any:
        with equation.ctx.manager:
            params = equation.primitive.get_bind_params(equation.params)
            return equation.primitive.bind(*operands, **params)

    return bind


def inline_calls(program: Program, *operands: Any) -> list[Any]:
    """What the program computes, without a call to another program on the way."""

    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        called = _CALLED.get(equation.primitive.name)
        if called is None:
            return None
        return lambda *operands: inline_calls(equation.params[called], *operands)

    return eval_jaxpr(program, rule_for, *operands)
