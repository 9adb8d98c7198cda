"""Where in a program a layer begins and ends, found from where its parameters meet the data.

A layer is a chain of equations that take parameters of one module together with data, one after
another with nothing but moves in between: a product and a bias, or the shift, scale and bias of a
normalisation. So it is found whatever framework has written the program.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend import core

from gradnorm_jax import convolution
from gradnorm_jax.jaxprs import (
    Program,
    Rule,
    body,
    inline_calls,
    inner_programs,
    is_call,
    shape_of,
)
from gradnorm_jax.per_example.analysis import (
    Origins,
    find_origins,
    origin_of,
    origins_in_turn,
)
from gradnorm_jax.per_example.graph import Graph
from gradnorm_jax.tree import matching_prefix

AFTER = "after:"
"""What stands before a pattern that names whole parts of the network."""

OUTPUTS = "gradnorm_jax.outputs"
"""The name that a classifier's outputs have in a program that goes on from them."""

_POSITION = re.compile(r"(\w+)\[(-?\d+)\]")
_NOT_OPENED = {"cond", "while", "custom_jvp_call", "custom_vjp_call", "shard_map"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}

Name = TypeVar("Name")


class Site(NamedTuple):
    """A layer, a part of the network, or one operation, where it is applied.

    Attributes:
        name: of the layer.
        input: the variable that goes in.
        output: the variable that comes out.
        equation: what it begins with.
        parameters: paths of those that it takes.
    """

    name: str
    input: Any
    output: Any
    equation: core.JaxprEqn
    parameters: frozenset[str]

    @property
    def is_product(self) -> bool:
        """Whether it begins with a product by a parameter: a dense or convolutional layer."""
        return self.equation.primitive.name in _PRODUCTS


class Sites(NamedTuple):
    """What is tapped in a program.

    Attributes:
        program: with all calls and rematerialised parts opened.
        here: in the program itself.
        loops: the loops in whose bodies something is, and what.
    """

    program: Program
    here: tuple[Site, ...]
    loops: "tuple[Loop, ...]"

    def all(self) -> list[Site]:
        """Those of loops too, in the order of execution."""
        positions = {out: i for i, eqn in enumerate(body(self.program).eqns) for out in eqn.outvars}
        found = [(positions[site.output], [site]) for site in self.here]
        found += [(positions[each.result], each.sites.all()) for each in self.loops]
        return [site for _, sites in sorted(found, key=lambda pair: pair[0]) for site in sites]


class Loop(NamedTuple):
    """A `jax.lax.scan`, and what is tapped in its body."""

    equation: core.JaxprEqn
    sites: Sites

    @property
    def result(self) -> Any:
        """The variable that the loop is known by."""
        return self.equation.outvars[0]


class Wanted(NamedTuple):
    """What is asked for.

    Attributes:
        leaves: paths of parameters whose layers are.
        parts: patterns for subtrees of parameters whose outputs are.
        positions: an operation and which of its uses, such as ("relu", -1).
    """

    leaves: frozenset[str]
    parts: tuple[str, ...] = ()
    positions: tuple[tuple[str, int], ...] = ()


def read_position(text: str) -> tuple[str, int] | None:
    """`relu[-1]` as ("relu", -1); None for a path."""
    found = _POSITION.fullmatch(text)
    return (found[1], int(found[2])) if found else None


def open_calls(program: Program) -> Program:
    """The program with the bodies of calls, and of what is rematerialised, in their places."""
    if not any(is_call(eqn) or eqn.primitive.name == "remat2" for eqn in body(program).eqns):
        return program

    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        if equation.primitive.name == "remat2":
            return functools.partial(inline_calls, equation.params["jaxpr"], rule_for)
        return convolution.plain_rule(equation)

    inputs = [variable.aval for variable in body(program).invars]
    return jax.make_jaxpr(functools.partial(inline_calls, program, rule_for))(*inputs)


def find_sites(program: Program, inputs: Sequence[Origins], wanted: Wanted) -> Sites:
    """The places of what is wanted in a program, given what each of its inputs is.

    Raises:
        ValueError: a layer is applied more than once, or its parameters enter where nothing can be
            tapped; or there is no such operation.
    """
    program = open_calls(program)
    graph = Graph(program, find_origins(program, inputs))
    layers, loops = _layers(graph, wanted.leaves)
    parts = [_part(graph, name, leaves) for name, leaves in _by_part(graph, wanted.parts).items()]
    positions = [_position(graph, *each) for each in wanted.positions]
    return Sites(program, (*layers, *parts, *positions), loops)


def _site(graph: Graph, name: str, first: int, output: Any, parameters: Iterable[str] = ()) -> Site:
    """What begins with an equation and ends with a variable."""
    source = graph.common_source(graph.data(graph.whole(first)))
    if source is None:
        raise ValueError(f"what enters {name} comes from several inputs: tap it by position")
    return Site(name, source, output, graph.equations[first], frozenset(parameters))


def _layers(graph: Graph, leaves: frozenset[str]) -> tuple[list[Site], tuple[Loop, ...]]:
    """The layers of selected parameters, and the loops that have some in them."""
    modules: dict[str, list[str]] = {}
    looped: dict[int, None] = {}
    for path, entries in graph.entries.items():
        kinds = {graph.name(i) for i in entries}
        if kinds == {"scan"} and len(entries) == 1:
            looped |= dict.fromkeys(entries) if path in leaves else {}
        elif (closed := kinds & _NOT_OPENED) and path in leaves:
            raise ValueError(
                f"parameter {path} enters a {min(closed)}, in which nothing can be tapped; select "
                "other layers"
            )
        else:
            modules.setdefault(_module(path), []).append(path)
    found = [
        _site(graph, name, first, graph.equations[graph.whole(last)].outvars[0], own)
        for module, members in modules.items()
        for first, last, name, own in _chains(graph, module, members, leaves)
    ]
    return found, tuple(_in_loop(graph, i, leaves) for i in looped)


def _chains(
    graph: Graph,
    module: str,
    members: Sequence[str],
    leaves: frozenset[str],
) -> Iterable[tuple[int, int, str, list[str]]]:
    """The first and the last entry of each selected layer of a module, its name and parameters."""
    chains: list[list[int]] = []
    for i in sorted({i for path in members for i in graph.entries[path]}):
        if chains:
            end = graph.equations[graph.whole(chains[-1][-1])].outvars[0]
            goes_on = end in map(graph.before_moves, graph.data(i))
            if goes_on and graph.name(i) not in _PRODUCTS:
                chains[-1].append(i)
                continue
        chains.append([i])
    for chain in chains:
        own = [path for path in members if not set(chain).isdisjoint(graph.entries[path])]
        if leaves.isdisjoint(own):
            continue
        several = [path for path in own if not set(chain) >= set(graph.entries[path])]
        if several:
            raise ValueError(
                f"parameter {several[0]} is used {len(graph.entries[several[0]])} times; tap the "
                'uses by their position, such as "dot_general[0]"'
            )
        yield chain[0], chain[-1], module if module and len(chains) == 1 else own[0], own


def _in_loop(graph: Graph, number: int, leaves: frozenset[str]) -> Loop:
    equation = graph.equations[number]
    operands = [origin_of(atom, graph.origins) for atom in equation.invars]
    inside = origins_in_turn(equation, operands)
    return Loop(equation, find_sites(equation.params["jaxpr"], inside, Wanted(leaves)))


def _by_part(graph: Graph, patterns: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each part of the network that a pattern names."""
    parts: dict[str, list[str]] = {}
    for path in graph.entries:
        for pattern in patterns:
            prefix = matching_prefix(path, pattern)
            if prefix is not None:
                parts.setdefault(AFTER + prefix, []).append(path)
    return parts


def _part(graph: Graph, name: str, leaves: Sequence[str]) -> Site:
    """What comes after the last layer of a part, and what joins or rectifies it elementwise."""
    entries = {i for path in leaves for i in graph.entries[path]}
    last = graph.equations[graph.whole(max(entries))]
    used = [out for out in last.outvars if out in graph.users]
    if len(used) != 1:
        raise ValueError(f"{name} ends in {last.primitive.name}, which has {len(used)} results")
    (output,) = used
    while len(users := graph.users.get(output, [])) == 1 and users[0] not in graph.all_entries:
        (result, *others) = graph.equations[users[0]].outvars
        same = shape_of(result).shape == shape_of(output).shape
        if others or not (same or graph.name(users[0]) == "concatenate"):
            break
        output = result
    return _site(graph, name, min(entries), output, leaves)


def _position(graph: Graph, operation: str, index: int) -> Site:
    """One of the uses of an operation on data, counted in the order of execution."""
    ends = [i for i, e in enumerate(graph.equations) if e.params.get("name") == OUTPUTS]
    end = ends[-1] if ends else len(graph.equations)
    on_data = [i for i in range(end) if graph.data(i)]
    found = [i for i in on_data if operation in _operations(graph.equations[i])]
    if not -len(found) <= index < len(found):
        names = sorted(set[str]().union(*(_operations(graph.equations[i]) for i in on_data)))
        raise ValueError(
            f"there is no {operation}[{index}]: the network has {len(found)} of these; there are "
            + ", ".join(names)
        )
    number = found[index]
    return _site(graph, f"{operation}[{index}]", number, graph.equations[number].outvars[0])


def _operations(equation: core.JaxprEqn) -> set[str]:
    """What an equation may be called: its primitive, the function that it calls, or a rectifier."""
    name = equation.primitive.name
    names = {name, str(equation.params.get("name", name))}
    if name == "custom_jvp_call":
        (inner,) = inner_programs(equation)
        names = names.union(*map(_operations, body(inner).eqns))
    literals = [atom.val for atom in equation.invars if isinstance(atom, core.Literal)]
    return names | ({"relu"} if name == "max" and 0 in literals else set())


def operations(program: Program) -> set[str]:
    """Names of all that is done in a program, and in those that it calls."""
    found: set[str] = set()
    for equation in body(program).eqns:
        found |= _operations(equation).union(*map(operations, inner_programs(equation)))
    return found


def _module(path: str) -> str:
    # The variables of an NNX state are nodes of their own: conv/kernel/value.
    return path.removesuffix("/value").rpartition("/")[0]
