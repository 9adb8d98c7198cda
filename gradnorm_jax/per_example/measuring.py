"""Norms of one example's gradients, measured wherever possible without forming them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.norms import Orders, entrywise_norm, norms_of_norms
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.per_example.layers import (
    Norm,
    norm_by_gradient,
    norm_without_gradient,
    with_norm_probe,
)
from gradnorm_jax.per_example.placement import as_varying
from gradnorm_jax.per_example.places import Place, find_places, run_places
from gradnorm_jax.per_example.program import Loss


def norm_function(
    loss: Loss, *, ord: Orders, in_turn: bool
) -> Callable[[Any], dict[str, jax.Array]]:
    """`example -> {path: norm []}`, of K orders `[K]`, of the gradients of the selected parameters.

    Args:
        loss: of one example.
        ord: of the norms.
        in_turn: whether a few examples may be taken at a time, one after another: not if a compiler
            spreads them over devices.
    """
    places = find_places(loss.program, loss.origins)
    shapes = places.shapes()
    unmeasured = {path: loss.leaves[path] for path in loss.selected if path not in shapes}
    probes = {
        path: to_float32_at_least(jnp.zeros((*shape, *np.shape(ord)), loss.leaves[path].dtype))
        for path, shape in shapes.items()
    }
    norms_by_what_is_done: dict[str, Norm] = {}

    def norm_of(place: Place) -> Norm:
        norm = norm_without_gradient(place.entry, ord=ord) if place.is_parameter else None
        if norm is not None:
            return norm
        make_kernel = None if place.is_parameter else place.make_kernel
        norm = norm_by_gradient(place.entry, make_kernel, ord=ord, in_turn=in_turn)
        # Equal layers share one function, which is traced once.
        return norms_by_what_is_done.setdefault(place.what_is_done, jax.jit(norm))

    def measure(place: Place, probe: Any, sources: Any, *operands: jax.Array) -> jax.Array:
        return with_norm_probe(place.entry, norm_of(place))(*operands, sources, probe)

    def value(variables: tuple[Any, Any], example: Any) -> jax.Array:
        leaves, probes = variables
        (result,) = run_places(places, measure, probes, loss.operands(leaves, example))
        return result

    def norms(example: Any) -> dict[str, jax.Array]:
        gradients, measured = jax.grad(value)((unmeasured, as_varying(probes)), example)
        found = {path: entrywise_norm(each[None], ord=ord)[0] for path, each in gradients.items()}
        for path, each in measured.items():
            # Of loops, there are norms of each turn.
            found[path] = norms_of_norms(each[None], ord=ord)[0] if shapes[path] else each
        return {path: found[path] for path in loss.selected}

    return norms
