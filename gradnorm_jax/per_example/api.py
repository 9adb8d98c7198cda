"""Per-example gradients, their norms, and any reduction of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from gradnorm_jax.norms import Orders
from gradnorm_jax.numerics import check_orders
from gradnorm_jax.per_example.arguments import as_partial, check_batch
from gradnorm_jax.per_example.engine import reduced_gradients
from gradnorm_jax.per_example.placement import find_placement
from gradnorm_jax.tree import Params, Select, selected_paths, tree_like

LossFn = Callable[[Params, Any], jax.Array]
"""`(params, batch) -> [B]` losses, for a pytree `batch` of arrays `[B, ...]`."""

Reduce = Callable[[str, jax.Array], Any]
"""`(path, gradients [b, *shape]) -> pytree of arrays [b, ...]`."""


def per_example_grad_norms(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    ord: Orders = 1,
    select: Select = None,
    mask: ArrayLike | None = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    as_tree: bool = False,
) -> Any:
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
        ord: q, at least 0.5, or infinity; or several, such as `(1, 2, math.inf)`, from gradients
            that are formed once. Where one order needs them formed, they are formed for all.
        select: which parameters: None for all; a pattern for the path, whose keys are joined by
            '/', or several, where `*` stands for any text and a subtree for all its leaves; or a
            predicate on the path.
        mask: `[B]` bool, false for padding: whatever such a row of the batch holds, NaN too, its
            results are zeros. It costs as much as the others, which it does not change.
        microbatch_size: how many examples each device takes at a time, all if None. The last
            microbatch is filled up; what fills it is dropped.
        mesh: devices to split the batch over, B being any number. If None it is the mesh of the
            context (`jax.set_mesh`) or of the arrays; inside `shard_map` each device keeps what it
            has.
        as_tree: return a tree like `params` in place of a dict by path, with None, which is no
            leaf, for the parameters that are not selected.

    Returns:
        `{path: [B]}`, of K orders `{path: [B, K]}`, >= 0, in float32 or in the parameter's type if
        that is wider.

    Raises:
        ValueError: `select` matches nothing, `ord` or `microbatch_size` is out of range, the leaves
            of the batch differ in B, or the mask is not `[B]` bool.
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
    check_orders(ord)
    return _run(
        loss_fn,
        params,
        batch,
        None,
        ord=tuple(ord) if isinstance(ord, Sequence) else ord,
        select=select,
        mask=mask,
        microbatch_size=microbatch_size,
        mesh=mesh,
        as_tree=as_tree,
    )


def per_example_reduce(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    reduce: Reduce,
    select: Select = None,
    mask: ArrayLike | None = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    as_tree: bool = False,
) -> Any:
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
        mask: `[B]` bool, false for padding, whose rows of the results are zeros.
        microbatch_size: the largest b, for each device.
        mesh: devices to split the batch over.
        as_tree: return a tree like `params` in place of a dict by path.

    Returns:
        `{path: pytree of arrays [B, ...]}`.

    Raises:
        TypeError: `reduce` is no function, or does not return an array `[b, ...]` for each b.
    """
    if not callable(reduce):
        raise TypeError(f"reduce must be a function (path, gradients), got {reduce!r}")
    return _run(
        loss_fn,
        params,
        batch,
        reduce,
        select=select,
        mask=mask,
        microbatch_size=microbatch_size,
        mesh=mesh,
        as_tree=as_tree,
    )


def per_example_grads(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    select: Select = None,
    mask: ArrayLike | None = None,
    microbatch_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    as_tree: bool = False,
) -> Any:
    """Every example's gradient, for every selected parameter.

    All B gradients are returned, so memory must hold them. The guarantees, and the arguments and
    errors not told here, are those of `per_example_grad_norms`.

    Args:
        loss_fn: `(params, batch) -> [B]`.
        params: pytree of parameters.
        batch: pytree of arrays `[B, ...]`.
        select: which parameters.
        mask: `[B]` bool, false for padding, whose gradients are zeros.
        microbatch_size: how many examples each device takes at a time.
        mesh: devices to split the batch over.
        as_tree: return a tree like `params` in place of a dict by path.

    Returns:
        `{path: [B, *shape]}`, in the parameter's type.
    """
    return _run(
        loss_fn,
        params,
        batch,
        _keep,
        select=select,
        mask=mask,
        microbatch_size=microbatch_size,
        mesh=mesh,
        as_tree=as_tree,
    )


def _keep(path: str, gradients: jax.Array) -> jax.Array:
    return gradients


def _run(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    reduce: Reduce | None,
    *,
    ord: float | tuple[float, ...] = 1,
    select: Select,
    mask: ArrayLike | None,
    microbatch_size: int | None,
    mesh: Mesh | AbstractMesh | None,
    as_tree: bool,
) -> Any:
    found = reduced_gradients(
        as_partial(loss_fn),
        params,
        batch,
        None if reduce is None else as_partial(reduce),
        check_batch(batch, mask, microbatch_size),
        ord=ord,
        selected=selected_paths(params, select),
        microbatch_size=microbatch_size,
        placement=find_placement(batch, mesh),
    )
    return tree_like(params, found) if as_tree else found
