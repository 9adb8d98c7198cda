"""The engine: trace the loss of one example, rewrite it, differentiate it, reduce its gradients."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gradnorm_jax.jaxprs import Program, Rule, eval_jaxpr
from gradnorm_jax.norms import Orders, entrywise_norm
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.per_example.analysis import (
    ParameterUse,
    ParameterUses,
    find_entries,
    keeps_entries,
)
from gradnorm_jax.per_example.layers import (
    Norm,
    is_product,
    norm_by_gradient,
    norm_without_gradient,
    with_norm_probe,
)
from gradnorm_jax.per_example.placement import (
    Placement,
    as_varying,
    pad_batch,
    spread,
    zero_rows,
)
from gradnorm_jax.per_example.program import (
    batchable_rule,
    convolutions,
    differentiated_rule,
    trace_loss,
)
from gradnorm_jax.tree import Params, leaves_by_name

GradientFunction = Callable[[Any], dict[str, jax.Array]]
"""`example -> {path: gradient}`; in place of a gradient there may be its norm, or its factors."""


class FallbackWarning(UserWarning):
    """The per-example gradients of some parameters cost what `vmap(grad)` would."""


class Loss(NamedTuple):
    """The loss of one example.

    Attributes:
        program: takes `constants`, then the leaves of the parameters, then those of an example.
        constants: arrays bound to the loss function.
        leaves: of the parameters, by path.
        selected: paths of the parameters to differentiate with respect to.
        entries: how these enter the loss.
    """

    program: Program
    constants: list[jax.Array]
    leaves: dict[str, jax.Array]
    selected: tuple[str, ...]
    entries: ParameterUses


class Measured(NamedTuple):
    """An equation in whose place the norm of a parameter's gradient is measured.

    Attributes:
        path: of the parameter.
        rule: `(lhs, rhs, probe) -> result`; the cotangent of `probe` is the norm.
        probe: zeros like the norm.
    """

    path: str
    rule: Callable[..., jax.Array]
    probe: jax.Array


@functools.partial(jax.jit, static_argnames=("ord", "selected", "microbatch_size", "placement"))
def reduced_gradients(
    loss_fn: jax.tree_util.Partial,
    params: Params,
    batch: Any,
    reduce: jax.tree_util.Partial | None,
    mask: jax.Array | None = None,
    *,
    ord: Orders,
    selected: tuple[str, ...],
    microbatch_size: int | None,
    placement: Placement,
) -> dict[str, Any]:
    """By path `reduce(path, gradients)`, or the norms of order `ord` where `reduce` is None."""

    def share_fn(shared: Any, rows: Any) -> dict[str, Any]:
        loss_fn, params, reduce = as_varying(shared)
        batch, mask = rows
        loss = trace(loss_fn, params, batch, selected)
        warn_of_fallback(loss)
        if reduce is None:
            places = _measured(loss, ord, in_turn=placement.known)
            reduce = _norm_unless_measured({place.path for place in places.values()}, ord)
        else:
            places = {}
        gradient_of = _gradient_function(loss, places)

        def of_microbatch(rows: Any) -> dict[str, Any]:
            batch, mask = rows
            gradients = map_examples(gradient_of, batch, placement)
            results = {path: _reduced(reduce, path, each) for path, each in gradients.items()}
            return zero_rows(results, mask)

        # Zeros from the start, for what padding holds is not to be seen in derivatives either.
        return by_microbatches(of_microbatch, (zero_rows(batch, mask), mask), microbatch_size)

    return spread(share_fn, placement)((loss_fn, params, reduce), (batch, mask))


def _reduced(reduce: Callable[[str, jax.Array], Any], path: str, gradients: jax.Array) -> Any:
    results = reduce(path, gradients)
    for leaf in jax.tree.leaves(results):
        if jnp.shape(leaf)[:1] != gradients.shape[:1]:
            raise TypeError(
                f"reduce must return arrays [b, ...], a row for each example; of the gradients "
                f"{list(gradients.shape)} of {path} it returned {jax.typeof(leaf)}"
            )
    return results


def _norm_unless_measured(
    measured: Collection[str], ord: Orders
) -> Callable[[str, jax.Array], jax.Array]:
    def norm(path: str, gradients: jax.Array) -> jax.Array:
        return gradients if path in measured else entrywise_norm(gradients, ord=ord)

    return norm


def trace(
    loss_fn: jax.tree_util.Partial, params: Params, batch: Any, selected: tuple[str, ...]
) -> Loss:
    """The loss of one of the batch's examples."""
    leaves, constants = leaves_by_name(params), jax.tree.leaves(loss_fn)
    program = trace_loss(loss_fn, params, _first(batch))
    origins = [
        *[frozenset[str]() for _ in constants],
        *[frozenset({path}.intersection(selected)) for path in leaves],
        *[None for _ in jax.tree.leaves(batch)],
    ]
    return Loss(program, constants, leaves, selected, find_entries(program, origins))


def warn_of_fallback(loss: Loss) -> None:
    """Names the selected parameters that are differentiated as `vmap(grad)` would."""
    paths = [path for path in loss.selected if path in loss.entries.without_rule]
    if paths:
        warnings.warn(
            "loops and functions with a derivative rule of their own are differentiated as "
            "vmap(grad) would, in time and memory; this concerns the per-example gradients of "
            + ", ".join(paths),
            FallbackWarning,
            stacklevel=2,
        )


def _measured(loss: Loss, ord: Orders, *, in_turn: bool) -> dict[core.Var, Measured]:
    """By their result, the products by kernels whose gradients' norms are measured there."""

    def norm_for(path: str, entry: ParameterUse) -> Norm:
        if keeps_entries(loss.program, entry.variable):
            norm = norm_without_gradient(entry, ord=ord)
            if norm is not None:
                return norm
        make_kernel = functools.partial(_make_kernel, loss, path, entry)
        return norm_by_gradient(entry, make_kernel, loss.leaves[path], ord=ord, in_turn=in_turn)

    def place(path: str, entry: ParameterUse) -> Measured:
        probe = to_float32_at_least(jnp.zeros(np.shape(ord), loss.leaves[path].dtype))
        return Measured(path, with_norm_probe(entry, norm_for(path, entry)), probe)

    return {
        entry.equation.outvars[0]: place(path, entry)
        for path, entry in loss.entries.sole.items()
        if is_product(entry)
    }


def _make_kernel(loss: Loss, path: str, entry: ParameterUse, leaf: jax.Array) -> jax.Array:
    """What becomes of the parameter at `path` until it enters the loss."""
    operands = [*loss.constants, *(loss.leaves | {path: leaf}).values()]
    (kernel,) = eval_jaxpr(loss.program, batchable_rule, *operands, results=[entry.variable])
    return kernel


def _gradient_function(loss: Loss, places: Mapping[core.Var, Measured]) -> GradientFunction:
    probes = {place.path: place.probe for place in places.values()}
    unmeasured = {path: loss.leaves[path] for path in loss.selected if path not in probes}

    def value(variables: tuple[Any, Any], example: Any) -> jax.Array:
        leaves, probes = variables

        def rule_for(equation: core.JaxprEqn) -> Rule | None:
            place = places.get(equation.outvars[0]) if equation.outvars else None
            if place is None:
                return batchable_rule(equation)
            return functools.partial(place.rule, probe=probes[place.path])

        operands = [*loss.constants, *(loss.leaves | leaves).values(), *jax.tree.leaves(example)]
        (result,) = eval_jaxpr(loss.program, rule_for, *operands)
        return result

    def gradients(example: Any) -> dict[str, jax.Array]:
        of_leaves, norms = jax.grad(value)((unmeasured, as_varying(probes)), example)
        return {path: (of_leaves | norms)[path] for path in loss.selected}

    return gradients


def map_examples(
    gradient_of: GradientFunction, batch: Any, placement: Placement
) -> dict[str, jax.Array]:
    """The gradients of all examples at once, if a compiler that splits them will do so rightly."""
    program, shapes = jax.make_jaxpr(gradient_of, return_shape=True)(_first(batch))

    def gradients(example: Any) -> dict[str, jax.Array]:
        results = eval_jaxpr(program, differentiated_rule, *jax.tree.leaves(example))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    batched = jax.vmap(gradients)
    if not placement.known and _groups(program) != _groups(jax.make_jaxpr(batched)(batch)):
        return jax.lax.map(gradients, batch)
    return batched(batch)


def _groups(program: Program) -> Counter[tuple[int, int]]:
    """How many convolutions have how many groups; by batching, some get more."""
    return Counter(
        (equation.params["feature_group_count"], equation.params["batch_group_count"])
        for equation in convolutions(program)
    )


def by_microbatches(
    function: Callable[[Any], dict[str, Any]], batch: Any, size: int | None
) -> dict[str, Any]:
    """`function(batch)`, `size` examples at a time, the last microbatch filled up."""
    examples = len(jax.tree.leaves(batch)[0])
    if size is None or size >= examples:
        return function(batch)
    results = jax.lax.map(function, microbatches(batch, size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:examples], results)


def microbatches(batch: Any, size: int) -> Any:
    """The batch as arrays `[*, size, ...]`, filled up with its last example."""
    padded = pad_batch(batch, size)
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), padded)


def _first(batch: Any) -> Any:
    return jax.tree.map(lambda x: x[0], batch)
