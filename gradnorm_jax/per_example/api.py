"""Per-example gradients, their norms, and any reduction of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.tree_util import Partial

from gradnorm_jax.numerics import check_order
from gradnorm_jax.per_example.engine import reduced_gradients
from gradnorm_jax.per_example.placement import find_placement
from gradnorm_jax.tree import Params, Select, selected_paths

LossFn = Callable[[Params, Any], jax.Array]
"""`(params, batch) -> [B]` losses, for a pytree `batch` of arrays `[B, ...]`."""

Reduce = Callable[[str, jax.Array], Any]
"""`(path, gradients [b, *shape]) -> pytree of arrays [b, ...]`."""


def per_example_grad_norms(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    ord: float = 1,
    select: Select = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, jax.Array]:
    r"""The norm of every example's gradient, for every selected parameter.

    .. math:: n_b = \|\nabla_\theta L(\theta, x_b)\|_q

    Exact: the numbers are those of `jax.grad` of one example after another, up to rounding. An
    example's norm depends on that example alone. The arithmetic is that of one ordinary backward
    pass over the batch. A kernel that is used once has its gradients formed for a few examples at a
    time, and none at all where it multiplies one row for each example (a classifier's last layer)
    or, for the 2-norm, few rows. So it is under `jax.checkpoint`, and in `jax.lax.scan` where each
    turn takes a row of the parameter, as with `nn.scan`. Nothing below the selected parameters is
    differentiated: the norms of the last layer cost a forward pass. The norms, the gradients and
    what is made of them can be differentiated again, forwards (`jax.jvp`, `jax.jacfwd`) and in
    reverse.

    >>> norms = per_example_grad_norms(loss_fn, params, images, ord=1, select="block4")
    >>> whole = combine_norms(norms, ord=1)  # over block4 as one vector, [B]

    Args:
        loss_fn: pure function `(params, batch) -> [B]`, the loss of each example by itself: it is
            traced for a batch of one example. Arrays that it needs and that are neither parameters
            nor data are best bound by `jax.tree_util.Partial`.
        params: pytree of parameters.
        batch: pytree of arrays `[B, ...]`.
        ord: q, at least 0.5, or infinity.
        select: which parameters: None for all; a pattern for the path, whose keys are joined by
            '/', or several, where `*` stands for any text and a subtree for all its leaves; or a
            predicate on the path.
        microbatch_size: how many examples each device takes at a time, all if None. The last
            microbatch is filled up; what fills it is dropped.
        mesh: devices to split the batch over, B being any number. If None it is the mesh of the
            context (`jax.set_mesh`) or of the arrays; inside `shard_map` each device keeps what it
            has.

    Returns:
        `{path: [B]}`, >= 0, in float32 or in the parameter's type if that is wider.

    Raises:
        ValueError: `select` matches nothing, `ord` or `microbatch_size` is out of range, or the
            leaves of the batch differ in B.
        TypeError: `loss_fn` does not return real numbers of shape `[B]`, or a selected parameter
            holds integers.

    Warns:
        FallbackWarning: once for each program, naming the parameters that all turns of a loop
            share (those of a recurrent cell) or that enter a function with its own derivative.
            Their gradients are as exact, but take the time and memory of
            `jax.vmap(jax.grad(...))`.

    References:
        Goodfellow (2015), "Efficient Per-Example Gradient Computations", for outer products.
        https://arxiv.org/abs/1510.01799
        Rochette et al. (2019), "Efficient Per-Example Gradient Computations in Convolutional Neural
        Networks". https://arxiv.org/abs/1912.06015
        Li et al. (2022), "Large Language Models Can Be Strong Differentially Private Learners", for
        the 2-norm from Gram matrices. https://arxiv.org/abs/2110.05679
    """
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
    """Any reduction of every example's gradient, for every selected parameter.

    `reduce` sees the gradients of one parameter for one microbatch, and the compiler frees them
    when it is done with them: the gradients of all parameters need not exist at once, and with a
    `microbatch_size` those of all examples never do. The other guarantees, and the arguments and
    errors not told here, are those of `per_example_grad_norms`.

    >>> def squared_sum(path, gradients):
    ...     return (gradients**2).sum(axis=tuple(range(1, gradients.ndim)))
    >>> moments = per_example_reduce(loss_fn, params, images, reduce=squared_sum)

    Args:
        loss_fn: `(params, batch) -> [B]`.
        params: pytree of parameters.
        batch: pytree of arrays `[B, ...]`.
        reduce: pure function `(path, gradients [b, *shape]) -> pytree of arrays [b, ...]`, of each
            example by itself. Large arrays that it needs are best bound by `jax.tree_util.Partial`.
        select: which parameters.
        microbatch_size: the largest b, for each device.
        mesh: devices to split the batch over.

    Returns:
        `{path: pytree of arrays [B, ...]}`.

    Raises:
        TypeError: `reduce` is no function, or does not return an array `[b, ...]` for each b.
    """
    if not callable(reduce):
        raise TypeError(f"reduce must be a function (path, gradients), got {reduce!r}")
    return _run(loss_fn, params, batch, reduce, 1, select, microbatch_size, mesh)


def per_example_grads(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    select: Select = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, jax.Array]:
    """Every example's gradient, for every selected parameter.

    All B gradients are returned, so memory must hold them. The guarantees, and the arguments and
    errors not told here, are those of `per_example_grad_norms`.

    Args:
        loss_fn: `(params, batch) -> [B]`.
        params: pytree of parameters.
        batch: pytree of arrays `[B, ...]`.
        select: which parameters.
        microbatch_size: how many examples each device takes at a time.
        mesh: devices to split the batch over.

    Returns:
        `{path: [B, *shape]}`, in the parameter's type.
    """
    return _run(loss_fn, params, batch, _keep, 1, select, microbatch_size, mesh)


def _keep(path: str, gradients: jax.Array) -> jax.Array:
    return gradients


def _run(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    reduce: Reduce | None,
    ord: float,
    select: Select,
    microbatch_size: int | None,
    mesh: Mesh | AbstractMesh | None,
) -> dict[str, Any]:
    _check(batch, microbatch_size)
    return reduced_gradients(
        _as_pytree(loss_fn),
        params,
        batch,
        None if reduce is None else _as_pytree(reduce),
        ord=ord,
        selected=selected_paths(params, select),
        microbatch_size=microbatch_size,
        placement=find_placement(batch, mesh),
    )


def _as_pytree(function: Callable[..., Any]) -> Partial:
    """`function` as a pytree whose leaves are the arrays bound to it."""
    return function if isinstance(function, Partial) else Partial(function)


def _check(batch: Any, microbatch_size: int | None) -> None:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "all leaves of the batch must have one first axis of at least one example; "
            f"got first axes {sorted(sizes)}"
        )
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, got {microbatch_size}")
