"""Activations of layers, and cotangents with respect to them, of every example: taps."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.tree_util import Partial

from gradnorm_jax.jaxprs import Program
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.per_example.analysis import Origins
from gradnorm_jax.per_example.arguments import as_partial
from gradnorm_jax.per_example.passes import Tap, What, both_ways, forward
from gradnorm_jax.per_example.placement import Placement, as_varying, find_placement, spread
from gradnorm_jax.per_example.program import trace_loss
from gradnorm_jax.per_example.sites import (
    AFTER,
    OUTPUTS,
    Site,
    Sites,
    Wanted,
    find_sites,
    read_position,
)
from gradnorm_jax.tree import Params, Select, leaves_by_name, selected_paths
from gradnorm_jax.types import Model, Outputs, Variables

Scalar = Callable[[Outputs], jax.Array]
"""`outputs -> [B]`, of each example by itself."""


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
    made = None if reduce is None else as_partial(reduce)
    read = functools.partial(_read, reduce=made, select=as_hashable(select), what=kinds)
    if not isinstance(model_or_loss, Model):
        if scalar is not None:
            raise ValueError("a loss is its own scalar; give scalar only for a Model")
        loss_fn = Partial(_loss_of, as_partial(model_or_loss))
        return lambda params, batch: read(
            loss_fn, Variables(params), batch, placement=find_placement(batch, mesh)
        )
    model = model_or_loss
    of_model = Partial(_scalar_of, model.function, as_partial(scalar or _kl))
    return lambda images: read(
        of_model, model.variables, images, placement=find_placement(images, mesh)
    )


def layer_sites(model: Model, images: Any, select: Select = None) -> list[Site]:
    """The layers that `taps` would read of a model, in the order of execution."""
    loss_fn = Partial(_scalar_of, model.function, Partial(_kl))
    return find_in(trace_loss, loss_fn, model.variables, images, select).all()


def as_hashable(select: Select) -> Select:
    """A selection as `taps` takes it: patterns as a tuple."""
    return select if select is None or callable(select) else _as_tuple(select)


def _as_tuple(select: Any) -> tuple[str, ...]:
    return (select,) if isinstance(select, str) else tuple(select)


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
        sites = find_in(trace_loss, loss_fn, variables, batch, select)
        fixed = jax.tree.leaves((loss_fn, variables))
        read = forward if "cotangent" not in what else both_ways

        def of_example(example: Any) -> dict[str, Any]:
            return read(sites, what, reduce, [*fixed, *jax.tree.leaves(example)])

        return jax.vmap(of_example)(batch)

    return spread(share_fn, placement)((loss_fn, variables, reduce), batch)


def find_in(
    trace: Callable[..., Program],
    function: Partial,
    variables: Variables,
    batch: Any,
    select: Select,
) -> Sites:
    """What is selected in the program that `trace` makes of a function of one example."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    program = trace(function, variables, example)
    params = leaves_by_name(variables.params)
    origins = [
        *[frozenset[str]() for _ in jax.tree.leaves(function)],
        *[frozenset({path}) for path in params],
        *_origins_of_state(variables.state, params),
        *[None for _ in jax.tree.leaves(batch)],
    ]
    sites = find_sites(program, origins, _wanted(variables.params, select))
    found = frozenset[str]().union(*(site.parameters for site in sites.all()))
    whole = select is None or callable(select)
    for each in [select] if whole else filter(_is_pattern, _as_tuple(select)):
        pattern = each.removeprefix(AFTER) if isinstance(each, str) else each
        if found.isdisjoint(selected_paths(variables.params, pattern)):
            raise ValueError(f"select={each!r} names no layer that works on the data")
    return sites


def _is_pattern(text: str) -> bool:
    return read_position(text) is None


def _origins_of_state(state: Any, params: Mapping[str, Any]) -> Sequence[Origins]:
    """Batch statistics and the like, as parameters of their modules where these have some."""
    modules = {path.rpartition("/")[0] for path in params}

    def origin(path: str) -> frozenset[str]:
        # With, or without, the collection that Linen keeps them in.
        names = [n for n in (path, path.partition("/")[2]) if n.rpartition("/")[0] in modules]
        return frozenset(names[:1])

    return [origin(path) for path in leaves_by_name(state)]


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
        else:
            paths.append(each)
    leaves = selected_paths(params, paths) if paths or not (parts or positions) else ()
    return Wanted(frozenset(leaves), tuple(parts), tuple(positions))
