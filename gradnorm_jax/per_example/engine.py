"""The per-example gradient engine: trace, rewrite, differentiate, reduce."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from gradnorm_jax.losses import widen
from gradnorm_jax.norms import entrywise_norm
from gradnorm_jax.per_example.analysis import Entry, find_entries, keeps_entries
from gradnorm_jax.per_example.layers import (
    Norm,
    is_product,
    measured,
    norm_by_gradient,
    norm_without_gradient,
)
from gradnorm_jax.per_example.placement import Placement, as_varying, pad_batch, spread
from gradnorm_jax.per_example.program import (
    Program,
    Rule,
    batchable_rule,
    body,
    convolutions,
    evaluate,
    trace_loss,
)
from gradnorm_jax.per_example.selection import leaves_by_path
from gradnorm_jax.types import Params


class FallbackWarning(UserWarning):
    """The per-example gradients of some parameters cost what `vmap(grad)` would."""


@functools.partial(jax.jit, static_argnames=("ord", "paths", "microbatch_size", "placement"))
def reduced_gradients(
    loss_fn: jax.tree_util.Partial,
    params: Params,
    batch: Any,
    reduce: jax.tree_util.Partial | None,
    *,
    ord: float | None,  # noqa: A002
    paths: tuple[str, ...],
    microbatch_size: int | None,
    placement: Placement,
) -> dict[str, Any]:
    """By path `reduce(path, gradients)`, or norms of order `ord` where `reduce` is None."""

    def of_share(shared: Any, batch: Any) -> dict[str, Any]:
        loss_fn, params, reduce = as_varying(shared)
        gradient_of = _gradient_function(loss_fn, params, paths, ord, batch, placement)

        def of_microbatch(batch: Any) -> dict[str, Any]:
            gradients = _map_examples(gradient_of, batch, placement)
            if reduce is not None:
                return {path: reduce(path, gradient) for path, gradient in gradients.items()}
            # What is a scalar already is the norm; taking its norm again changes nothing.
            return {path: entrywise_norm(g, ord=ord) for path, g in gradients.items()}

        return _by_microbatches(of_microbatch, batch, microbatch_size)

    return spread(of_share, placement)((loss_fn, params, reduce), batch)


def _gradient_function(
    loss_fn: jax.tree_util.Partial,
    params: Params,
    paths: tuple[str, ...],
    ord: float | None,  # noqa: A002
    batch: Any,
    placement: Placement,
) -> Callable[[Any], dict[str, jax.Array]]:
    """`example -> {path: gradient}`, in place of which a parameter may have its norm already."""
    leaves = leaves_by_path(params)
    program = trace_loss(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    constants = jax.tree.leaves(loss_fn)
    entries = find_entries(
        program,
        [
            *[frozenset[str]()] * len(constants),
            *[frozenset({path} & set(paths)) for path in leaves],
            *[None] * len(jax.tree.leaves(batch)),
        ],
    )
    _warn_of_fallback([path for path in paths if path in entries.without_rule])

    def effective(path: str, leaf: jax.Array) -> jax.Array:
        """What becomes of a parameter until it meets data."""
        operands = (leaves | {path: leaf}).values()
        variable = entries.sole[path].variable
        (value,) = evaluate(program, batchable_rule, *constants, *operands, results=[variable])
        return value

    def norm_rule(path: str, entry: Entry) -> Norm:
        variable = entry.variable
        if keeps_entries(program, variable):
            norm = norm_without_gradient(entry, ord=ord)
            if norm is not None:
                return norm
        _, pull_back = jax.vjp(functools.partial(effective, path), leaves[path])
        return norm_by_gradient(
            entry,
            lambda gradient: pull_back(gradient)[0],
            ord=ord,
            in_turn=placement.known,
        )

    rules = {}
    if ord is not None:
        for path, entry in entries.sole.items():
            if is_product(entry):
                rules[entry.equation.outvars[0]] = path, measured(entry, norm_rule(path, entry))
    probes = {path: widen(jnp.zeros((), out.aval.dtype)) for out, (path, _) in rules.items()}

    def gradients(example: Any) -> dict[str, jax.Array]:
        def loss(variables: dict[str, jax.Array]) -> jax.Array:
            def rule_for(equation: core.JaxprEqn) -> Rule | None:
                if equation.outvars[0] not in rules:
                    return batchable_rule(equation)
                path, rule = rules[equation.outvars[0]]
                return functools.partial(rule, probe=variables[path])

            values = [
                leaf if path in probes else variables.get(path, leaf)
                for path, leaf in leaves.items()
            ]
            (value,) = evaluate(program, rule_for, *constants, *values, *jax.tree.leaves(example))
            return value

        return jax.grad(loss)({path: leaves[path] for path in paths} | as_varying(probes))

    return gradients


def _map_examples(
    gradient_of: Callable[[Any], dict[str, jax.Array]], batch: Any, placement: Placement
) -> dict[str, jax.Array]:
    """The gradients of all examples at once, if a compiler that splits them will do so rightly."""
    batched = jax.vmap(gradient_of)
    if not placement.known:
        alone = jax.make_jaxpr(gradient_of)(jax.tree.map(lambda x: x[0], batch))
        if _groups(alone) != _groups(jax.make_jaxpr(batched)(batch)):
            return jax.lax.map(gradient_of, batch)
    return batched(batch)


def _groups(program: Program) -> Counter[tuple[int, int]]:
    """How often a convolution has how many groups; by batching some become grouped."""
    return Counter(
        (equation.params["feature_group_count"], equation.params["batch_group_count"])
        for equation in convolutions(program)
    )


def _warn_of_fallback(paths: list[str]) -> None:
    if paths:
        warnings.warn(
            "loops and functions with a derivative rule of their own are differentiated as "
            "vmap(grad) would, in time and memory; this concerns the per-example gradients of "
            + ", ".join(paths),
            FallbackWarning,
            stacklevel=2,
        )


def _by_microbatches(
    function: Callable[[Any], dict[str, Any]], batch: Any, size: int | None
) -> dict[str, Any]:
    """`function(batch)`, `size` examples at a time, the last microbatch filled up."""
    examples = len(jax.tree.leaves(batch)[0])
    if size is None or size >= examples:
        return function(batch)
    split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), pad_batch(batch, size))
    results = jax.lax.map(function, split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:examples], results)
