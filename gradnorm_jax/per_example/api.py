"""Per-example gradients, their norms, and any reduction of them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.tree_util import Partial

from gradnorm_jax.norms import check_order
from gradnorm_jax.per_example.engine import reduced_gradients
from gradnorm_jax.per_example.placement import find_placement
from gradnorm_jax.per_example.selection import Select, selected_paths
from gradnorm_jax.types import Params

LossFn = Callable[[Params, Any], jax.Array]
"""`(params, batch) -> [B]` losses, for a pytree `batch` of arrays `[B, ...]`."""

Reduce = Callable[[str, jax.Array], Any]
"""`(path, gradients [b, *shape]) -> pytree of arrays [b, ...]`."""


def per_example_grad_norms(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    ord: float = 1,  # noqa: A002
    select: Select = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, jax.Array]:
    check_order(ord)
    return _run(loss_fn, params, batch, None, ord, select, microbatch_size, mesh)


def per_example_reduce(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    reduce: Reduce,
    select: Select = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, Any]:
    return _run(loss_fn, params, batch, reduce, None, select, microbatch_size, mesh)


def per_example_grads(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    select: Select = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, jax.Array]:
    return _run(loss_fn, params, batch, _keep, None, select, microbatch_size, mesh)


def _keep(path: str, gradients: jax.Array) -> jax.Array:
    return gradients


def _run(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    reduce: Reduce | None,
    ord: float | None,  # noqa: A002
    select: Select,
    microbatch_size: int | None,
    mesh: Mesh | AbstractMesh | None,
) -> dict[str, Any]:
    return reduced_gradients(
        Partial(loss_fn),
        params,
        batch,
        None if reduce is None else Partial(reduce),
        ord=ord,
        paths=selected_paths(params, select),
        microbatch_size=microbatch_size,
        placement=find_placement(batch, mesh),
    )
