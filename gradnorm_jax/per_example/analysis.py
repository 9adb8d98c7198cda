"""How parameters enter a loss: at one place, at several, or through something without a rule.

A variable of the program that depends on parameters but not on the example is an effective
parameter: a standardised kernel, a kernel in another type. It enters the loss where an equation
takes it together with something that depends on the example.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from gradnorm_jax.jaxprs import (
    Program,
    body,
    called_program,
    inner_programs,
    is_call,
    needed,
    scan_sizes,
)

Origins = frozenset[str] | None
"""The parameters that a variable comes from; None if it depends on the example as well."""

_NO_PATHS: frozenset[str] = frozenset()

_KEEPS_ENTRIES = {"convert_element_type", "copy", "expand_dims", "reshape", "squeeze", "transpose"}
"""Primitives whose result holds the entries of their operand, in whatever order."""


class ParameterUse(NamedTuple):
    """The one place at which a parameter enters the loss.

    Attributes:
        equation: takes the effective parameter together with data.
        position: of the effective parameter among the operands.
    """

    equation: core.JaxprEqn
    position: int

    @property
    def variable(self) -> Any:
        """The effective parameter."""
        return self.equation.invars[self.position]


class ParameterUses(NamedTuple):
    """How the parameters enter a loss.

    Attributes:
        sole: by path, of the parameters that enter at one place and not mixed with others.
        without_rule: paths of the parameters that enter a loop, or a function with a derivative
            rule of its own.
    """

    sole: dict[str, ParameterUse]
    without_rule: frozenset[str]


def find_origins(program: Program, inputs: Sequence[Origins]) -> dict[Any, Origins]:
    """What all variables of a program come from, given that of each of its inputs."""
    jaxpr = body(program)
    origins: dict[Any, Origins] = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        operands = [origin_of(atom, origins) for atom in equation.invars]
        result = None if None in operands else all_paths(operands)
        origins.update(dict.fromkeys(equation.outvars, result))
    return origins


def origin_of(atom: Any, origins: Mapping[Any, Origins]) -> Origins:
    """What an operand comes from: a variable, a constant or a literal."""
    return origins.get(atom, _NO_PATHS) if isinstance(atom, core.Var) else _NO_PATHS


def all_paths(origins: Sequence[Origins]) -> frozenset[str]:
    """The parameters that any of several operands come from, those that are data left out."""
    return _NO_PATHS.union(*(origin for origin in origins if origin is not None))


def find_entries(program: Program, inputs: Sequence[Origins]) -> ParameterUses:
    """The entries of all parameters into a loss, given what each of its inputs is."""
    jaxpr = body(program)
    origins = find_origins(program, inputs)
    entries: dict[str, list[ParameterUse | None]] = {}
    without_rule = _NO_PATHS
    for equation in jaxpr.eqns:
        operands = [origin_of(atom, origins) for atom in equation.invars]
        paths = all_paths(operands)
        if not (None in operands and paths):
            continue
        without_rule |= _without_rule(equation, operands, paths)
        for position, origin in enumerate(operands):
            for path in origin or ():
                alone = ParameterUse(equation, position) if len(origin or ()) == 1 else None
                entries.setdefault(path, []).append(alone)
    for atom in jaxpr.outvars:
        for path in origin_of(atom, origins) or ():
            entries.setdefault(path, []).append(None)
    sole = {
        path: found[0]
        for path, found in entries.items()
        if len(found) == 1 and found[0] is not None
    }
    return ParameterUses(sole, without_rule)


def keeps_entries(program: Program, variable: Any) -> bool:
    """Whether a variable holds the entries of one input of the program, in whatever order."""
    jaxpr = body(program)
    made_by = {result: equation for equation in jaxpr.eqns for result in equation.outvars}
    while variable in made_by:
        if made_by[variable].primitive.name not in _KEEPS_ENTRIES:
            return False
        variable = made_by[variable].invars[0]
    return variable in jaxpr.invars


def inputs_of(program: Program, variable: Any) -> set[Any]:
    """The inputs of a program that a variable is made of."""
    atoms = [atom for equation in needed(program, [variable]) for atom in equation.invars]
    found = {atom for atom in (variable, *atoms) if isinstance(atom, core.Var)}
    return found.intersection(body(program).invars)


def origins_in_turn(equation: core.JaxprEqn, operands: Sequence[Origins]) -> list[Origins]:
    """What the operands of a `jax.lax.scan` are inside of it.

    What is carried depends on the example from some turn on, or it would be no layer's input.
    """
    fixed, carried = scan_sizes(equation)
    return [*operands[:fixed], *[None] * carried, *operands[fixed + carried :]]


def _without_rule(
    equation: core.JaxprEqn, operands: Sequence[Origins], paths: frozenset[str]
) -> frozenset[str]:
    if equation.primitive.name == "remat2" or is_call(equation):
        return find_entries(called_program(equation), operands).without_rule
    if equation.primitive.name == "scan":
        # What all turns share has a gradient that adds up over them.
        shared = all_paths(operands[: sum(scan_sizes(equation))])
        inside = origins_in_turn(equation, operands)
        return shared | find_entries(equation.params["jaxpr"], inside).without_rule
    if equation.primitive.name == "cond":
        branches = equation.params["branches"]
        return _NO_PATHS.union(*(find_entries(b, operands[1:]).without_rule for b in branches))
    has_rule = not inner_programs(equation) and equation.params.get("batch_group_count", 1) == 1
    return _NO_PATHS if has_rule else paths
