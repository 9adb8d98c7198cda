"""Where in a program norms of gradients are measured, in loops and recomputed parts too."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from gradnorm_jax.jaxprs import (
    Program,
    Rule,
    body,
    eval_jaxpr,
    inner_programs,
    needed,
    run_scan,
    scan_sizes,
)
from gradnorm_jax.per_example.analysis import (
    Origins,
    ParameterUse,
    find_entries,
    find_origins,
    inputs_of,
    keeps_entries,
    origin_of,
    origins_in_turn,
)
from gradnorm_jax.per_example.layers import is_product
from gradnorm_jax.per_example.program import batchable_rule, inline

_OPENED = {"scan", "remat2"}


class Place(NamedTuple):
    """A product by a kernel, where the norm of a parameter's gradient can be measured.

    Attributes:
        path: of the parameter.
        entry: the product.
        sources: inputs of the program that the kernel is made of, the parameter the first.
        make_kernel: `(*sources) -> kernel`.
        is_parameter: whether the kernel holds the parameter's entries, in whatever order.
        what_is_done: equal for places at which the same is done to other numbers.
    """

    path: str
    entry: ParameterUse
    sources: tuple[core.Var, ...]
    make_kernel: Callable[..., jax.Array]
    is_parameter: bool
    what_is_done: str

    @property
    def result(self) -> core.Var:
        """The product."""
        return self.entry.equation.outvars[0]


class Places(NamedTuple):
    """Places in a program, and in the programs inside of it.

    Attributes:
        program: that they are in.
        here: by the result of the product.
        inner: by the first result of a loop, or of what is computed again (`jax.checkpoint`).
        turns: how often the program runs; None if it is no loop's body.
    """

    program: Program
    here: dict[core.Var, Place]
    inner: "dict[core.Var, Places]"
    turns: int | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """How many norms there are of each parameter: those in loops have one for each turn."""
        found: dict[str, tuple[int, ...]] = {place.path: () for place in self.here.values()}
        for places in self.inner.values():
            found |= places.shapes()
        turns = () if self.turns is None else (self.turns,)
        return {path: (*turns, *shape) for path, shape in found.items()}


Measure = Callable[[Place, Any, tuple[jax.Array, ...], jax.Array, jax.Array], jax.Array]
"""`(place, probe, sources, lhs, rhs) -> result of the product`."""


def find_places(program: Program, inputs: Sequence[Origins], turns: int | None = None) -> Places:
    """The places of a program.

    A parameter has its place inside a loop if each turn takes a row of it, and inside a recomputed
    part if this takes the whole; not if either takes something made of it.

    Args:
        program: without calls.
        inputs: what each of its inputs is.
        turns: how often it runs, if it is a loop's body.
    """
    jaxpr = body(program)
    origins = find_origins(program, inputs)
    parameters = {path: variable for variable in jaxpr.invars for path in origins[variable] or ()}
    here = {}
    sole = find_entries(program, inputs).sole
    for path, entry in sole.items():
        if is_product(entry):
            parameter, inputs_of_kernel = parameters[path], inputs_of(program, entry.variable)
            others = [v for v in jaxpr.invars if v in inputs_of_kernel and v is not parameter]
            sources = (parameter, *others)
            make_kernel = functools.partial(_make_kernel, program, sources, entry.variable)
            is_parameter = keeps_entries(program, entry.variable)
            done = _what_is_done(program, entry, parameter) or path
            place = Place(path, entry, sources, make_kernel, is_parameter, done)
            here[place.result] = place
    inner = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in _OPENED:
            inside = _inputs_inside(program, origins, equation, sole)
            body_of = inline(equation.params["jaxpr"])
            places = find_places(body_of, inside, turns=equation.params.get("length"))
            if places.here or places.inner:
                inner[equation.outvars[0]] = places
    return Places(program, here, inner, turns)


def run_places(
    places: Places, measure: Measure, probes: Mapping[str, Any], operands: Sequence[Any]
) -> list[Any]:
    """The results of a program, the products at its places done by `measure`."""
    known = dict(zip(body(places.program).invars, operands, strict=True))

    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        result = equation.outvars[0] if equation.outvars else None
        if result in places.here:
            place = places.here[result]
            sources = tuple(known[variable] for variable in place.sources)
            return functools.partial(measure, place, probes[place.path], sources)
        if result in places.inner:
            return functools.partial(run_inner, equation, places.inner[result])
        return batchable_rule(equation)

    def run_inner(equation: core.JaxprEqn, inner: Places, *operands: Any) -> list[Any]:
        def run(probes: Any, *operands: Any) -> tuple[list[Any], None]:
            return run_places(inner, measure, probes, operands), None

        own = {path: probes[path] for path in inner.shapes()}
        if inner.turns is not None:
            return run_scan(equation, run, own, *operands)[0]
        options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
        return jax.checkpoint(run, **options)(own, *operands)[0]

    return eval_jaxpr(places.program, rule_for, *operands)


def _make_kernel(
    program: Program, sources: Sequence[core.Var], kernel: core.Var, *arrays: jax.Array
) -> jax.Array:
    values = dict(zip(sources, arrays, strict=True))
    operands = [values.get(variable) for variable in body(program).invars]
    (result,) = eval_jaxpr(program, batchable_rule, *operands, results=[kernel])
    return result


def _what_is_done(program: Program, entry: ParameterUse, source: core.Var) -> str:
    """How the kernel is made of the parameter alone, and what it multiplies; "" if of more."""
    making = needed(program, [entry.variable])
    names = {source: "parameter"}
    words = []
    for equation in making:
        operands = [names.get(v) if isinstance(v, core.Var) else v for v in equation.invars]
        if None in operands or inner_programs(equation):
            return ""
        names |= {v: f"v{len(names)}.{i}" for i, v in enumerate(equation.outvars)}
        words.append(f"{equation.outvars[0].aval} = {equation.primitive} {operands}")
        words.append(str(equation.params))
    equation = entry.equation
    shapes = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    product = f"{equation.primitive} {entry.position} {shapes} {equation.params}"
    return "\n".join([str(source.aval), *words, product])


def _inputs_inside(
    program: Program,
    origins: Mapping[Any, Origins],
    equation: core.JaxprEqn,
    sole: Mapping[str, ParameterUse],
) -> list[Origins]:
    """What the operands of a loop, or of a recomputed part, are inside of it."""
    operands = [origin_of(atom, origins) for atom in equation.invars]
    fixed = 0
    if equation.primitive.name == "scan":
        operands = origins_in_turn(equation, operands)
        fixed, _ = scan_sizes(equation)
    # What all turns share has a gradient that adds up over them: no turn knows its norm.
    found = {
        entry.position: frozenset({path})
        for path, entry in sole.items()
        if entry.equation is equation
        and entry.position >= fixed
        and keeps_entries(program, entry.variable)
    }
    return [
        None if origin is None else found.get(position, frozenset())
        for position, origin in enumerate(operands)
    ]
