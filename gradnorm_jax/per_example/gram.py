"""Gram matrices of the gradients of several examples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from gradnorm_jax.numerics import to_common_float, to_float32_at_least
from gradnorm_jax.per_example.analysis import ParameterUse
from gradnorm_jax.per_example.api import LossFn
from gradnorm_jax.per_example.arguments import as_partial, check_batch
from gradnorm_jax.per_example.engine import (
    by_microbatches,
    map_examples,
    microbatches,
    trace,
    warn_of_fallback,
)
from gradnorm_jax.per_example.factors import factor_function, plain_products
from gradnorm_jax.per_example.layers import fast_memory, matrices, sizes
from gradnorm_jax.per_example.placement import Placement, as_varying, find_placement, spread
from gradnorm_jax.tree import Params, Select, selected_paths

Factors = tuple[jax.Array, jax.Array]
"""X `[B, R, K]` and G `[B, R, O]`, the gradient of an example being X^T G."""


def gradient_gram(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    other: Any = None,
    *,
    select: Select = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, jax.Array]:
    r"""Inner products of the gradients of all pairs of examples, for every selected parameter.

    .. math:: G_{ij} = \langle \nabla_\theta L(\theta, x_i), \nabla_\theta L(\theta, x'_j) \rangle

    The sum over the parameters is the Gram matrix of whole gradients: of a network's output in
    place of a loss, the empirical neural tangent kernel. An entry depends on its two examples
    alone.

    For a kernel that multiplies R rows for each example, X_i, and has cotangents G_i, the inner
    product is the sum of (X_i X_j^T) * (G_i G_j^T), R by R. It is taken from these where they cost
    less than gradients, a few examples at a time; otherwise the gradients of a microbatch are
    formed, one parameter after another. Devices exchange what they find of their share of `other`.
    The other guarantees, and the arguments and errors not told here, are those of
    `per_example_grad_norms`.

    >>> gram = gradient_gram(loss_fn, params, test_images, train_images, select="head")
    >>> kernel = sum(gram.values())  # [B, B']

    Args:
        loss_fn: `(params, batch) -> [B]`.
        params: pytree of parameters.
        batch: pytree of arrays `[B, ...]`.
        other: as `batch`, of any size B', by default `batch` itself.
        select: which parameters.
        microbatch_size: how many examples of either batch each device takes at a time, m. The
            passes over `other` are done again for every microbatch of `batch`, B / m times.
        mesh: devices to split both batches over.

    Returns:
        `{path: [B, B']}`, in float32 or wider.

    Raises:
        ValueError: `other` differs from `batch` in more than its size.

    References:
        Jacot, Gabriel, Hongler (2018), "Neural Tangent Kernel". https://arxiv.org/abs/1806.07572
        Novak, Sohl-Dickstein, Schoenholz (2022), "Fast Finite Width Neural Tangent Kernel", on
        structured derivatives. https://arxiv.org/abs/2206.08720
    """
    check_batch(batch, microbatch_size=microbatch_size)
    if other is not None:
        check_batch(other)
        if _of_one(other) != _of_one(batch):
            raise ValueError(
                "other must have the structure, shapes and types of batch, but for its size: "
                f"{_of_one(batch)}, got {_of_one(other)}"
            )
    return _gram(
        as_partial(loss_fn),
        params,
        batch,
        other,
        selected=selected_paths(params, select),
        microbatch_size=microbatch_size,
        placement=find_placement((batch, other), mesh),
    )


def _of_one(batch: Any) -> tuple[Any, list[str]]:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [f"{jnp.result_type(x)}{list(jnp.shape(x)[1:])}" for x in leaves]


def _size(batch: Any) -> int:
    return len(jax.tree.leaves(batch)[0])


@functools.partial(jax.jit, static_argnames=("selected", "microbatch_size", "placement"))
def _gram(
    loss_fn: jax.tree_util.Partial,
    params: Params,
    batch: Any,
    other: Any,
    *,
    selected: tuple[str, ...],
    microbatch_size: int | None,
    placement: Placement,
) -> dict[str, jax.Array]:
    def share_fn(shared: Any, batches: Any) -> dict[str, jax.Array]:
        (loss_fn, params), (batch, other) = as_varying(shared), batches
        other = batch if other is None else other
        loss = trace(loss_fn, params, batch, selected)
        warn_of_fallback(loss)
        entries = {path: e for path, e in plain_products(loss).items() if _pays(e, *counts)}
        gradient_of = factor_function(loss, entries)

        def factors(batch: Any) -> dict[str, Factors]:
            found = map_examples(gradient_of, batch, placement)
            return {path: _as_factors(entries.get(path), each) for path, each in found.items()}

        def gram(mine: dict[str, Factors], theirs: dict[str, Factors]) -> dict[str, jax.Array]:
            if placement.mesh is not None:
                theirs = lax.all_gather(theirs, placement.mesh.axis_names, tiled=True)
            return {
                path: inner_products(each, theirs[path], in_turn=placement.known)
                for path, each in mine.items()
            }

        def rows(part: Any) -> dict[str, jax.Array]:
            mine = factors(part)
            if part is other:  # the whole batch with itself: one pass does
                return gram(mine, mine)
            return _by_columns(lambda part: gram(mine, factors(part)), other, microbatch_size)

        return by_microbatches(rows, batch, microbatch_size)

    counts = [_size(batch), _size(batch if other is None else other)]
    grams = spread(share_fn, placement)((loss_fn, params), (batch, other))
    # Without the columns of what fills up the devices' shares.
    return {path: gram[:, : counts[1]] for path, gram in grams.items()}


def _pays(entry: ParameterUse, rows: int, columns: int) -> bool:
    """Whether inner products cost less from the factors than from gradients."""
    r, fan_in, fan_out = sizes(entry)
    r += r > 1
    pairs, size = rows * columns, fan_in * fan_out
    return pairs * r**2 * (fan_in + fan_out) <= size * (pairs + r * (rows + columns))


def _as_factors(entry: ParameterUse | None, found: Any) -> Factors:
    if entry is None:
        # A gradient is the product of itself, in one row, and of a one.
        x = to_float32_at_least(found.reshape(len(found), 1, -1))
        return x, jnp.ones_like(x, shape=(len(x), 1, 1))
    x, g = to_common_float(*jax.vmap(functools.partial(matrices, entry))(*found))
    return (x, g) if x.shape[1] == 1 else centered(x, g)


def centered(x: jax.Array, g: jax.Array) -> Factors:
    """Factors of the same X^T G, with what the rows of X have in common in a row of its own.

    Where the rows of G add up to nothing, this cancels in the end, and little else may be left. Of
    the mean m of the rows of X, and the sum s of those of G, X^T G = (X - 1 m^T)^T G + m s^T.
    """
    common = x.mean(axis=1, keepdims=True)
    summed = g.sum(axis=1, keepdims=True)
    return jnp.concatenate([x - common, common], 1), jnp.concatenate([g, summed], 1)


def inner_products(mine: Factors, theirs: Factors, *, in_turn: bool) -> jax.Array:
    """`[B, B']` of all pairs of gradients, a few examples of `mine` at a time if `in_turn`."""

    def of_some(mine: Factors) -> jax.Array:
        products = map(_dot, mine, theirs)
        return functools.reduce(jnp.multiply, products).sum(axis=(1, 3))

    x, y = mine[0], theirs[0]
    size = len(y) * x.shape[1] * y.shape[1] * x.dtype.itemsize
    at_once = max(1, fast_memory() // size)
    if not in_turn or x.shape[1] == 1 or at_once >= len(x):
        return of_some(mine)
    return lax.map(
        lambda one: of_some(jax.tree.map(lambda x: x[None], one))[0], mine, batch_size=at_once
    )


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[b, R, K], [c, S, K] -> [b, R, c, S]`."""
    return jnp.real(jnp.tensordot(x, y.conj(), axes=(2, 2), precision=lax.Precision.HIGHEST))


def _by_columns(
    function: Callable[[Any], dict[str, jax.Array]], other: Any, size: int | None
) -> dict[str, jax.Array]:
    """`function(other)`, a block of columns for `size` examples of every device at a time."""
    columns = _size(other)
    if size is None or size >= columns:
        return function(other)

    def join(blocks: jax.Array) -> jax.Array:
        count, rows, _ = blocks.shape
        by_device = jnp.moveaxis(blocks.reshape(count, rows, -1, size), 0, 2)
        return by_device.reshape(rows, -1, count * size)[:, :, :columns].reshape(rows, -1)

    return jax.tree.map(join, lax.map(function, microbatches(other, size)))
