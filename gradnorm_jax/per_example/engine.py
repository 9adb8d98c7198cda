"""The engine: trace the loss of one example, rewrite it, differentiate it, reduce its gradients."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax.jaxprs import Program, eval_jaxpr, without_constants
from gradnorm_jax.norms import Orders
from gradnorm_jax.per_example.analysis import find_entries
from gradnorm_jax.per_example.measuring import norm_function
from gradnorm_jax.per_example.placement import (
    Placement,
    as_varying,
    pad_batch,
    spread,
    zero_rows,
)
from gradnorm_jax.per_example.program import (
    Loss,
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


@functools.partial(jax.jit, static_argnames=("ord", "selected", "microbatch_size", "placement"))
def reduced_gradients(
    loss_fn: jax.tree_util.Partial,
    params: Params,
    batch: Any,
    reduce: jax.tree_util.Partial | None,
    mask: jax.Array | None,
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
            of_example = norm_function(loss, ord=ord, in_turn=placement.known)
        else:
            of_example = _gradient_function(loss)

        def of_microbatch(rows: Any) -> dict[str, Any]:
            batch, mask = rows
            found = map_examples(of_example, batch, placement)
            if reduce is not None:
                found = {path: _reduced(reduce, path, each) for path, each in found.items()}
            return zero_rows(found, mask)

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


def trace(
    loss_fn: jax.tree_util.Partial, params: Params, batch: Any, selected: tuple[str, ...]
) -> Loss:
    """The loss of one of the batch's examples."""
    program, closed_over = without_constants(trace_loss(loss_fn, params, _first(batch)))
    leaves, constants = leaves_by_name(params), [*closed_over, *jax.tree.leaves(loss_fn)]
    origins = [
        *[frozenset[str]() for _ in constants],
        *[frozenset({path}.intersection(selected)) for path in leaves],
        *[None for _ in jax.tree.leaves(batch)],
    ]
    return Loss(program, constants, leaves, selected, origins)


def warn_of_fallback(loss: Loss) -> None:
    """Names the selected parameters that are differentiated as `vmap(grad)` would."""
    without_rule = find_entries(loss.program, loss.origins).without_rule
    paths = [path for path in loss.selected if path in without_rule]
    if paths:
        warnings.warn(
            "what all turns of a loop share, and functions with their own derivative, are "
            "differentiated as vmap(grad) would, in time and memory; this concerns the per-example "
            "gradients of " + ", ".join(paths),
            FallbackWarning,
            stacklevel=2,
        )


def _gradient_function(loss: Loss) -> GradientFunction:
    def value(variables: dict[str, jax.Array], example: Any) -> jax.Array:
        (result,) = eval_jaxpr(loss.program, batchable_rule, *loss.operands(variables, example))
        return result

    return functools.partial(jax.grad(value), {path: loss.leaves[path] for path in loss.selected})


def map_examples(gradient_of: GradientFunction, batch: Any, placement: Placement) -> dict[str, Any]:
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
