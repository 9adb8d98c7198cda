"""The equations of a program as a graph, with what is a parameter in it and what is data."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core

from gradnorm_jax.jaxprs import Program, body
from gradnorm_jax.per_example.analysis import Origins, all_paths, origin_of

_MOVES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
}


class Graph:
    """A program's equations by number, and what depends on what.

    Attributes:
        equations: of the program.
        origins: what each variable comes from.
        users: numbers of the equations that take a variable.
        entries: numbers of those that take a parameter together with data, by its path.
    """

    def __init__(self, program: Program, origins: Mapping[Any, Origins]) -> None:
        """Of a program without calls, given what its variables come from."""
        jaxpr = body(program)
        self.equations, self.origins = jaxpr.eqns, origins
        self.inputs = [v for v in jaxpr.invars if origins[v] is None]
        self.maker = {out: i for i, eqn in enumerate(self.equations) for out in eqn.outvars}
        self.users: dict[Any, list[int]] = {}
        self.entries: dict[str, list[int]] = {}
        for i, equation in enumerate(self.equations):
            for atom in dict.fromkeys(a for a in equation.invars if isinstance(a, core.Var)):
                self.users.setdefault(atom, []).append(i)
            operands = [origin_of(atom, origins) for atom in equation.invars]
            for path in all_paths(operands) if None in operands else ():
                self.entries.setdefault(path, []).append(i)
        self.all_entries = {i for each in self.entries.values() for i in each}

    def data(self, number: int) -> list[Any]:
        """The operands of an equation that depend on the example."""
        operands = self.equations[number].invars
        return [atom for atom in operands if origin_of(atom, self.origins) is None]

    def name(self, number: int) -> str:
        """Of what an equation does."""
        return self.equations[number].primitive.name

    def before_moves(self, variable: Any) -> Any:
        """The variable that one holds the entries of."""
        while variable in self.maker and self.name(self.maker[variable]) in _MOVES:
            variable = self.equations[self.maker[variable]].invars[0]
        return variable

    def whole(self, number: int) -> int:
        """An entry; for the factor of a normalisation, r * scale, the product x * (r * scale)."""
        (operand, *others) = self.data(number)
        root = self.maker.get(self.before_moves(operand))
        if others or self.name(number) != "mul" or root is None or self.name(root) != "rsqrt":
            return number
        variable = self.equations[number].outvars[0]
        while len(users := self.users.get(variable, [])) == 1:
            if self.name(users[0]) == "mul":
                return users[0]
            if self.name(users[0]) not in _MOVES:
                break
            variable = self.equations[users[0]].outvars[0]
        return number

    def common_source(self, variables: Sequence[Any]) -> Any:
        """The last variable that all ways from the example to some variables lead through."""
        if len(variables) == 1:
            return variables[0]
        above: dict[Any, Any] = dict.fromkeys(self.inputs)
        depth: dict[Any, int] = {None: 0, **dict.fromkeys(self.inputs, 1)}

        def meet(a: Any, b: Any) -> Any:
            while a is not b:
                a, b = (above[a], b) if depth[a] >= depth[b] else (a, above[b])
            return a

        for i, equation in enumerate(self.equations):
            operands = self.data(i)
            if operands:
                source = functools.reduce(meet, operands)
                above.update(dict.fromkeys(equation.outvars, source))
                depth.update(dict.fromkeys(equation.outvars, depth[source] + 1))
        return functools.reduce(meet, variables)
