"""Programs of primitives (jaxprs): the one interpreter, which can follow other rules."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax.extend import core

Program = Any
"""A closed jaxpr, whose type differs between versions of JAX."""

Rule = Callable[..., Any]
"""`(*operands) -> result`, in place of what one equation does."""

RuleFor = Callable[[core.JaxprEqn], Rule | None]
"""The rule for an equation; None for its own."""

_CALLED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Primitives that do nothing but call a program, and the parameter that holds it."""

_CALLED_WITH_OWN_DERIVATIVE = {
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that call a program too, with a derivative or a use of memory of their own."""

_WITH_BODIES = {*_CALLED, "remat2", "cond", "scan", "while"}
"""Primitives that hold programs, in whose place others with the same results may be put."""


def eval_jaxpr(
    program: Program,
    rule_for: RuleFor,
    *operands: Any,
    results: Sequence[core.Var] | None = None,
) -> list[Any]:
    """What the program computes, each equation done by `rule_for(equation)` if that is not None.

    Args:
        program: a closed jaxpr.
        rule_for: the rules to follow.
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
    for equation in needed(program, wanted, effects=results is None):
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
    return [value for value in values if _is_program(value)]


def called_program(equation: core.JaxprEqn) -> Program | None:
    """The program that an equation calls with its operands, and whose results are its own.

    None for anything that does more, such as a loop.
    """
    name = equation.primitive.name
    parameter = _CALLED.get(name) or _CALLED_WITH_OWN_DERIVATIVE.get(name)
    return None if parameter is None else equation.params[parameter]


def is_call(equation: core.JaxprEqn) -> bool:
    """Whether an equation does nothing but call a program."""
    return equation.primitive.name in _CALLED


def scan_sizes(equation: core.JaxprEqn) -> tuple[int, int]:
    """How many operands a `jax.lax.scan` has that stay the same, and how many that it carries.

    Versions of JAX tell this in different ways. But what is scanned over, and what is stacked, has
    an axis more outside of the loop than inside.
    """
    inner = body(equation.params["jaxpr"])

    def count_alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(shape_of(a).shape) == len(shape_of(b).shape) for a, b in pairs)

    carried = count_alike(equation.outvars, inner.outvars)
    return count_alike(equation.invars, inner.invars) - carried, carried


def run_scan(
    equation: core.JaxprEqn, turn: Callable[..., tuple[list[Any], Any]], beside: Any, *operands: Any
) -> tuple[list[Any], Any]:
    """A `jax.lax.scan` that takes and gives something more in every turn.

    Args:
        equation: of the loop.
        turn: `(beside, *operands of the body) -> (results of the body, found)`.
        beside: pytree of arrays, a row for each turn.
        *operands: of the loop.

    Returns:
        The results of the loop, and what is found, a row for each turn.
    """
    fixed, carried = scan_sizes(equation)
    carry = list(operands[fixed : fixed + carried])
    rows = (beside, list(operands[fixed + carried :]))

    def step(carry: list[Any], row: tuple[Any, list[Any]]) -> tuple[list[Any], Any]:
        beside, xs = row
        results, found = turn(beside, *operands[:fixed], *carry, *xs)
        return results[:carried], (results[carried:], found)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, found) = jax.lax.scan(step, carry, rows, **options)
    return [*carry, *ys], found


def body(program: Program) -> core.Jaxpr:
    """The jaxpr without its constants."""
    return cast(core.Jaxpr, getattr(program, "jaxpr", program))


def without_constants(program: Program) -> tuple[Program, list[Any]]:
    """The program with its constants as further inputs, before the others; and these constants."""
    jaxpr = body(program)
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    return core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=inputs), []), list(program.consts)


def shape_of(variable: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of a variable of a program."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def needed(
    program: Program, results: Sequence[Any], *, effects: bool = False
) -> list[core.JaxprEqn]:
    """The equations that results depend on, in order; with `effects`, those that have some too."""
    wanted = {atom for atom in results if isinstance(atom, core.Var)}
    kept = []
    for equation in reversed(body(program).eqns):
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


def everywhere(rule_for: RuleFor) -> RuleFor:
    """`rule_for`, followed in the bodies of calls, loops and branches as well.

    It is not in functions that have derivatives of their own.
    """

    def nested_rule_for(equation: core.JaxprEqn) -> Rule | None:
        rule = rule_for(equation)
        if rule is not None:
            return rule
        has_body = equation.primitive.name in _WITH_BODIES
        if not (has_body and any(map(has_rule, inner_programs(equation)))):
            return None
        if equation.primitive.name == "remat2":
            return functools.partial(recompute, equation)
        return functools.partial(run, equation)

    def has_rule(program: Program) -> bool:
        return any(nested_rule_for(equation) is not None for equation in body(program).eqns)

    def recompute(equation: core.JaxprEqn, *operands: Any) -> Any:
        params = equation.params
        evaluate = functools.partial(eval_jaxpr, params["jaxpr"], nested_rule_for)
        options = {name: params[name] for name in ("prevent_cse", "policy")}
        return jax.checkpoint(evaluate, **options)(*operands)

    def run(equation: core.JaxprEqn, *operands: Any) -> Any:
        params = jax.tree.map(rewrite, equation.params)
        return own_rule(equation.replace(params=params))(*operands)

    def rewrite(value: Any) -> Any:
        if not _is_program(value):
            return value
        inputs = [variable.aval for variable in body(value).invars]
        return jax.make_jaxpr(functools.partial(eval_jaxpr, value, nested_rule_for))(*inputs)

    return nested_rule_for


def inline_calls(program: Program, rule_for: RuleFor, *operands: Any) -> list[Any]:
    """What the program computes by `rule_for`, without a call to another program on the way."""

    def inlining_rule_for(equation: core.JaxprEqn) -> Rule | None:
        called = _CALLED.get(equation.primitive.name)
        if called is None:
            return rule_for(equation)
        return functools.partial(inline_calls, equation.params[called], rule_for)

    return eval_jaxpr(program, inlining_rule_for, *operands)
