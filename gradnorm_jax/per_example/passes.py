"""Passes through a program in which something is read at some places on the way."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.tree_util import Partial

from gradnorm_jax.convolution import faster_rule
from gradnorm_jax.jaxprs import Rule, body, eval_jaxpr, own_rule, run_scan, shape_of
from gradnorm_jax.per_example.placement import as_varying
from gradnorm_jax.per_example.sites import Loop, Site, Sites

What = Literal["input", "output", "cotangent"]


class Tap(NamedTuple):
    """What passes through a layer, None where it was not asked for.

    Attributes:
        input: what goes in, before anything is multiplied by a parameter.
        output: what comes out, the bias included.
        cotangent: the derivative of the scalar with respect to the output.
    """

    input: Any = None
    output: Any = None
    cotangent: Any = None


Step = Callable[[Site, Any, jax.Array, Any, dict[str, Any]], jax.Array]
"""`(site, input, output, probe, readings) -> output`: notes what is read in `readings`."""


def forward(
    sites: Sites, what: frozenset[What], reduce: Partial | None, operands: list[Any]
) -> dict[str, Any]:
    """The taps of one example, or what is made of them, by layer, from a forward pass.

    Args:
        sites: what is tapped in the program of a loss.
        what: is read there.
        reduce: what is made of it; None to keep it.
        operands: of the program.
    """

    def step(site: Site, x: Any, y: jax.Array, probe: None, readings: dict[str, Any]) -> jax.Array:
        tap = _tap(what, x, y)
        readings[site.name] = tap if reduce is None else reduce(site.name, tap)
        return y

    wanted = [*(site.output for site in sites.here), *(loop.result for loop in sites.loops)]
    return _run(sites, step, {}, operands, wanted)[1]


def both_ways(
    sites: Sites, what: frozenset[What], reduce: Partial | None, operands: list[Any]
) -> dict[str, Any]:
    """As `forward`, cotangents included: a forward and a backward pass."""

    def on_the_way_back(site: Site, x: Any, y: Any, g: Any) -> Any:
        if reduce is None:
            return _tap({"cotangent"}, x, y, g)
        return reduce(site.name, _tap(what, x, y, g))

    def step(site: Site, x: Any, y: jax.Array, probe: Any, readings: dict[str, Any]) -> jax.Array:
        readings[site.name] = _tap(what, x, y) if reduce is None else None
        kept = (x if "input" in what else None, y if "output" in what else None)
        return _with_probe(functools.partial(on_the_way_back, site), kept, y, probe)

    def value(probes: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        (result,), readings = _run(sites, step, probes, operands)
        return result, readings

    result, pull_back, forward = jax.vjp(value, _probes(sites, on_the_way_back), has_aux=True)
    (found,) = pull_back(jnp.ones_like(result))
    if reduce is not None:
        return found
    return {name: tap._replace(cotangent=found[name].cotangent) for name, tap in forward.items()}


def edit_outputs(sites: Sites, edit: Partial, operands: list[Any]) -> list[Any]:
    """The results for one example, of a program that goes on from what `edit` makes of outputs."""

    def step(site: Site, x: Any, y: jax.Array, probe: None, readings: dict[str, Any]) -> jax.Array:
        before = _of_one(y)
        after: jax.Array = edit(site.name, before)
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            raise TypeError(
                f"edit must return an array like the output of {site.name}, "
                f"{before.dtype}{list(before.shape)}; it returned {after.dtype}{list(after.shape)}"
            )
        return after.reshape(y.shape)

    return _run(sites, step, {}, operands)[0]


def _tap(what: Collection[What], *values: Any) -> Tap:
    """The record of those values that are asked for, without the axis of a batch of one."""
    named = zip(Tap._fields, values, strict=False)
    return Tap(**{name: _of_one(x) for name, x in named if name in what})


def _of_one(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[1:]) if x.shape[:1] == (1,) else x


def _with_probe(measure: Callable[..., Any], kept: Any, y: jax.Array, probe: Any) -> jax.Array:
    """`y`, with a further operand whose cotangent is `measure(*kept, cotangent of y)`."""

    @jax.custom_vjp
    def pass_on(kept: Any, y: jax.Array, probe: Any) -> jax.Array:
        return y

    def forward(kept: Any, y: jax.Array, probe: Any) -> tuple[jax.Array, Any]:
        return y, kept

    def backward(kept: Any, cotangent: jax.Array) -> tuple[None, jax.Array, Any]:
        # Measured before the pass goes on: then what it needs is not kept until the end.
        return None, *lax.optimization_barrier((cotangent, measure(*kept, cotangent)))

    pass_on.defvjp(forward, backward)
    return pass_on(kept, y, probe)


def _probes(sites: Sites, measure: Callable[..., Any]) -> dict[str, Any]:
    """Zeros like what `measure` finds at each site, a row for each turn of a loop."""
    probes = {}
    for site in sites.here:
        x, y = shape_of(site.input), shape_of(site.output)
        shapes = jax.eval_shape(functools.partial(measure, site), x, y, y)
        for leaf in jax.tree.leaves(shapes):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    "with cotangents, reduce must return floating arrays; of the tap of "
                    f"{site.name} it returned {leaf.dtype}{list(leaf.shape)}: cast it"
                )
        probes[site.name] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    for loop in sites.loops:
        turns = loop.equation.params["length"]
        inner = _probes(loop.sites, measure)
        probes |= jax.tree.map(lambda x, n=turns: jnp.zeros((n, *x.shape), x.dtype), inner)
    return as_varying(probes)


def _run(
    sites: Sites,
    step: Step,
    probes: Mapping[str, Any],
    operands: list[Any],
    wanted: list[Any] | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """The results of the program, or the `wanted` variables, and what is read on the way."""
    known = dict(zip(body(sites.program).invars, operands, strict=True))
    readings: dict[str, Any] = {}
    loops = {loop.result: loop for loop in sites.loops}
    outputs: dict[Any, list[Site]] = {}
    for site in sites.here:
        outputs.setdefault(site.output, []).append(site)
    watched = {*outputs, *(site.input for site in sites.here)}

    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        loop = loops.get(equation.outvars[0]) if equation.outvars else None
        rule = faster_rule(equation) if loop is None else functools.partial(run_loop, loop)
        if watched.isdisjoint(equation.outvars):
            return rule
        return functools.partial(observe, equation, rule or own_rule(equation))

    def observe(equation: core.JaxprEqn, rule: Rule, *operands: Any) -> Any:
        several = equation.primitive.multiple_results
        results = list(rule(*operands)) if several else [rule(*operands)]
        for i, variable in enumerate(equation.outvars):
            for site in outputs.get(variable, ()):
                x = known[site.input]
                results[i] = step(site, x, results[i], probes.get(site.name), readings)
            known[variable] = results[i]
        return results if several else results[0]

    def run_loop(loop: Loop, *operands: Any) -> list[Any]:
        def turn(own: Any, *operands: Any) -> tuple[list[Any], Any]:
            return _run(loop.sites, step, own, list(operands))

        own = {site.name: probes[site.name] for site in loop.sites.all() if probes}
        results, found = run_scan(loop.equation, turn, own, *operands)
        readings.update(found)
        return results

    return eval_jaxpr(sites.program, rule_for, *operands, results=wanted), readings
