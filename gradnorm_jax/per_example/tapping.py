"""Activations of layers, and cotangents with respect to them, of every example: taps."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh
from jax.tree_util import Partial

from gradnorm_jax.convolution import grouped_rule
from gradnorm_jax.jaxprs import Rule, body, eval_jaxpr, own_rule, shape_of
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.per_example.placement import Placement, as_varying, find_placement, spread
from gradnorm_jax.per_example.program import trace_loss
from gradnorm_jax.per_example.sites import (
    AFTER,
    OUTPUTS,
    Loop,
    Site,
    Sites,
    Wanted,
    find_sites,
    read_position,
)
from gradnorm_jax.tree import Params, Select, leaves_by_name, selected_paths
from gradnorm_jax.types import Model, Outputs, Variables

What = Literal["input", "output", "cotangent"]

Scalar = Callable[[Outputs], jax.Array]
"""`outputs -> [B]`, of each example by itself."""


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


ReduceTap = Callable[[str, Tap], Any]
"""`(layer, tap of one example) -> pytree of arrays`."""


def taps(
    model_or_loss: Model | Callable[[Params, Any], jax.Array],
    select: Select = None,
    what: Collection[What] = ("input", "output", "cotangent"),
    *,
    scalar: Scalar | None = None,
    reduce: ReduceTap | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Callable[..., dict[str, Any]]:
    """A function that reads layers: activations in and out, and derivatives with respect to them.

    All selected layers are read in one forward pass and, for cotangents, one backward pass. There
    are no hooks: layers are found in the traced program, from where their parameters meet the data.
    Only what is needed is computed: nothing after the last layer if no cotangent is asked for, no
    derivative below the first. An example's taps depend on that example alone; batch normalisation
    must use stored statistics.

    >>> read = taps(model, "block4", {"output", "cotangent"}, scalar=lambda out: out.logits.max(-1))
    >>> read(images)["block4/unit01/c/standardized_conv2d"].output  # [B, H, W, C]

    Args:
        model_or_loss: a `Model`, or a loss `(params, batch) -> [B]` as of `per_example_grad_norms`.
        select: which layers, by the paths of their parameters, as in `per_example_grad_norms`; None
            for all. `after:block4` is what leaves that part of the network: its last layer, and
            what is added to it or rectifies it. `relu[-1]`, `reduce_window_max[0]` are uses of an
            operation by their position among the operations on data, which need no parameters.
        what: which of "input", "output" and "cotangent".
        scalar: of the `Outputs` of a model, what to differentiate, KL(u || p) by default, as
            GradNorm does. A loss is its own.
        reduce: pure function `(layer, tap) -> pytree of arrays` of one example, of floats if there
            are cotangents. It is called while the pass is at that layer, so that activations and
            cotangents of all layers need not exist at once.
        mesh: devices to split the batch over, as in `per_example_grad_norms`.

    Returns:
        `read(images)` of a model, `read(params, batch)` of a loss: `{layer: Tap}`, or what is made
        of it, arrays `[B, ...]`, in the order of execution. A layer is called by the path of its
        module, or of its first parameter where a module holds several layers. In a loop
        (`jax.lax.scan`) all its turns are stacked, `[B, turns, ...]`. Layers that
        `jax.checkpoint` would compute again are kept.

    Raises:
        ValueError: nothing is selected or asked for, a selected layer is applied several times, or
            its parameters enter where nothing can be tapped (a conditional, a function with a
            derivative of its own).
        TypeError: as of `per_example_grad_norms`.
    """
    kinds = frozenset(what)
    if not kinds or kinds - {"input", "output", "cotangent"}:
        raise ValueError(f"what must be of input, output and cotangent, got {sorted(what)}")
    chosen = select if select is None or callable(select) else _as_tuple(select)
    made = None if reduce is None else _as_partial(reduce)
    read = functools.partial(_read, reduce=made, select=chosen, what=kinds)
    if not isinstance(model_or_loss, Model):
        if scalar is not None:
            raise ValueError("a loss is its own scalar; give scalar only for a Model")
        loss_fn = Partial(_loss_of, _as_partial(model_or_loss))
        return lambda params, batch: read(
            loss_fn, Variables(params), batch, placement=find_placement(batch, mesh)
        )
    model = model_or_loss
    of_model = Partial(_scalar_of, model.function, _as_partial(scalar or _kl))
    return lambda images: read(
        of_model, model.variables, images, placement=find_placement(images, mesh)
    )


def layer_sites(model: Model, images: Any, select: Select = None) -> list[Site]:
    """The layers that `taps` would read of a model, in the order of execution."""
    loss_fn = Partial(_scalar_of, model.function, Partial(_kl))
    return _find(loss_fn, model.variables, images, select).all()


def _as_tuple(select: Any) -> tuple[str, ...]:
    return (select,) if isinstance(select, str) else tuple(select)


def _as_partial(function: Callable[..., Any]) -> Partial:
    return function if isinstance(function, Partial) else Partial(function)


def _kl(outputs: Outputs) -> jax.Array:
    return kl_to_uniform(outputs.logits)


def _scalar_of(
    function: Partial, scalar: Partial, variables: Variables, images: jax.Array
) -> jax.Array:
    outputs = function(variables, images)
    return scalar(outputs._replace(logits=checkpoint_name(outputs.logits, OUTPUTS)))


def _loss_of(loss_fn: Partial, variables: Variables, batch: Any) -> jax.Array:
    return loss_fn(variables.params, batch)


@functools.partial(jax.jit, static_argnames=("select", "what", "placement"))
def _read(
    loss_fn: Partial,
    variables: Variables,
    batch: Any,
    *,
    reduce: Partial | None,
    select: Select,
    what: frozenset[What],
    placement: Placement,
) -> dict[str, Any]:
    def share_fn(shared: Any, batch: Any) -> dict[str, Any]:
        loss_fn, variables, reduce = as_varying(shared)
        sites = _find(loss_fn, variables, batch, select)
        fixed = jax.tree.leaves((loss_fn, variables))
        read = _forward if "cotangent" not in what else _both_ways

        def of_example(example: Any) -> dict[str, Any]:
            return read(sites, what, reduce, [*fixed, *jax.tree.leaves(example)])

        return jax.vmap(of_example)(batch)

    return spread(share_fn, placement)((loss_fn, variables, reduce), batch)


def _find(loss_fn: Partial, variables: Variables, batch: Any, select: Select) -> Sites:
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    program = trace_loss(loss_fn, variables, example)
    params = leaves_by_name(variables.params)
    origins = [
        *[frozenset[str]() for _ in jax.tree.leaves(loss_fn)],
        *[frozenset({path}) for path in params],
        *[frozenset({path}) for path in _names_of_state(variables, params)],
        *[None for _ in jax.tree.leaves(batch)],
    ]
    sites = find_sites(program, origins, _wanted(variables.params, select))
    if not sites.all():
        raise ValueError(f"select={select!r} names no layer that works on the data")
    return sites


def _names_of_state(variables: Variables, params: Mapping[str, Any]) -> list[str]:
    """Paths of batch statistics and the like, as if they were parameters of their modules."""
    modules = {path.rpartition("/")[0] for path in params}

    def name(path: str) -> str:
        inner = path.partition("/")[2]  # without the collection that Linen keeps them in
        return inner if inner.rpartition("/")[0] in modules else path

    return [name(path) for path in leaves_by_name(variables.state)]


def _wanted(params: Params, select: Select) -> Wanted:
    if select is None or callable(select):
        return Wanted(frozenset(selected_paths(params, select)))
    paths, parts, positions = [], [], []
    for each in _as_tuple(select):
        position = read_position(each)
        if position is not None:
            positions.append(position)
        elif each.startswith(AFTER):
            parts.append(each.removeprefix(AFTER))
            selected_paths(params, parts[-1])  # raises if there are none
        else:
            paths.append(each)
    leaves = selected_paths(params, paths) if paths or not (parts or positions) else ()
    return Wanted(frozenset(leaves), tuple(parts), tuple(positions))


Step = Callable[[Site, Any, jax.Array, Any, dict[str, Any]], jax.Array]
"""`(site, input, output, probe, readings) -> output`: notes what is read in `readings`."""


def _forward(
    sites: Sites, what: frozenset[What], reduce: Partial | None, operands: list[Any]
) -> dict[str, Any]:
    def step(site: Site, x: Any, y: jax.Array, probe: None, readings: dict[str, Any]) -> jax.Array:
        tap = _tap(what, x, y)
        readings[site.name] = tap if reduce is None else reduce(site.name, tap)
        return y

    wanted = [*(site.output for site in sites.here), *(loop.result for loop in sites.loops)]
    return _run(sites, step, {}, operands, wanted)[1]


def _both_ways(
    sites: Sites, what: frozenset[What], reduce: Partial | None, operands: list[Any]
) -> dict[str, Any]:
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
        rule = grouped_rule(equation) if loop is None else functools.partial(run_loop, loop)
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
        params = loop.equation.params
        first, rest = params["num_consts"], params["num_consts"] + params["num_carry"]
        carry: Any
        fixed, carry, xs = operands[:first], operands[first:rest], operands[rest:]
        own = {site.name: probes[site.name] for site in loop.sites.all() if probes}

        def turn(carry: Any, x: Any) -> tuple[Any, Any]:
            xs, own = x
            results, found = _run(loop.sites, step, own, [*fixed, *carry, *xs])
            return results[: len(carry)], (results[len(carry) :], found)

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, (ys, found) = lax.scan(turn, list(carry), (xs, own), **options)
        readings.update(found)
        return [*carry, *ys]

    return eval_jaxpr(sites.program, rule_for, *operands, results=wanted), readings
