"""Derivatives of the outputs by many parameters, seen from random directions."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from gradnorm_jax.numerics import check_count, to_common_float, to_float32_at_least
from gradnorm_jax.per_example import per_example_grads
from gradnorm_jax.per_example.tapping import as_hashable
from gradnorm_jax.scores.arrays import as_matrix, check_width, squared_norm
from gradnorm_jax.scores.output import energy
from gradnorm_jax.tree import Params, Select, leaves_by_name, selected_paths
from gradnorm_jax.types import Model, Variables


def gradient_projection(
    model: Model,
    images: jax.Array,
    *,
    directions: int = 16,
    select: Select = None,
    seed: int = 0,
) -> jax.Array:
    r"""The gradient of the energy by many parameters, seen from random directions.

    .. math:: \langle \partial L / \partial \theta, v_k \rangle, \quad L = \log \sum_c e^{z_c},
        \quad v_k \in \{-1, 1\}^P / \sqrt{K}

    Their squared length, and squared distances between them, are on average those of the gradients
    themselves, with a relative deviation of about sqrt(2 / K). No gradient is formed: they are
    derivatives along directions, each of all images at once. A direction is drawn anew when it is
    needed, so that no more than one takes memory. Costs about two forward passes a direction.

    Args:
        model: the network.
        images: `[B, ...]`.
        directions: K.
        select: which parameters; None for all.
        seed: of the directions.

    Returns:
        `[B, K]`, nats per unit of weight.

    Raises:
        ValueError: nothing is selected, or `directions` is not at least 1.

    References:
        Wu, Zhang, Lu et al. (2023), "Low-Dimensional Gradient Helps Out-of-Distribution Detection".
        There, directions are principal components of training gradients, or their class means.
        https://arxiv.org/abs/2310.17163
    """
    along = _along(energy, model, images, seed, directions=directions, select=as_hashable(select))
    return along.T


def logit_derivatives(
    model: Model,
    images: jax.Array,
    *,
    select: Select,
    directions: int | None = None,
    probes: int | None = None,
    seed: int = 0,
) -> jax.Array:
    r"""The Jacobian of the logits by some parameters, or a random sketch of it from both sides.

    .. math:: R J V, \quad J = \partial z / \partial \theta, \quad R \in \{-1, 1\}^{M \times C} /
        \sqrt{M}, \quad V \in \{-1, 1\}^{P \times K} / \sqrt{K}

    so that the average of its squared norm is that of J (Hutchinson), with a relative deviation of
    at most about sqrt(2 / M) or sqrt(2 / K). Without `probes` or `directions`, R or V is the
    identity. Costs about three forward passes for each of M probes or else C classes; or, given
    directions, two for each of K, however many classes there are.

    Args:
        model: the network.
        images: `[B, ...]`.
        select: which parameters.
        directions: K.
        probes: M.
        seed: of both.

    Returns:
        `[B, M or C, K or P]`.

    Raises:
        ValueError: nothing is selected, or `directions` or `probes` is not at least 1.
    """
    num_classes = jax.eval_shape(model, images).logits.shape[1]
    if probes is None:
        rows = jnp.eye(num_classes)
    else:
        check_count("probes", probes)
        rows = random_rows(seed, probes, num_classes)
    chosen = as_hashable(select)
    if directions is None:
        return _rows_by_gradients(model, images, rows, select=chosen)
    found = _along(to_float32_at_least, model, images, seed, directions=directions, select=chosen)
    if probes is None:
        return jnp.moveaxis(found, 0, 2)
    found, rows = to_common_float(found, rows)
    return jnp.einsum("mc,kbc->bmk", rows, found, precision=lax.Precision.HIGHEST)


def scod_of_parameters(
    model: Model,
    images: jax.Array,
    posterior_root: ArrayLike,
    *,
    select: Select,
    directions: int | None = None,
    probes: int | None = None,
    seed: int = 0,
) -> jax.Array:
    r"""Negative predictive variance of the logits under a Gaussian posterior of some parameters.

    .. math:: S = -tr(J \Sigma J^T) = -\sigma^2 \Big(\|J\|_F^2 - \sum_j \frac{\lambda_j}{\lambda_j +
        1 / (2 \sigma^2)} \|J u_j\|^2\Big)

    with J = dz / dtheta and the pairs (lambda_j, u_j) of sum_i J_i^T J_i over training images. J
    may be a sketch of either side, with the cost that `logit_derivatives` tells: SLU sketches as
    `directions` do. For the last layer alone `scod` has this in closed form.

    Args:
        model: the network.
        images: `[B, ...]`.
        posterior_root: `[P or K, R]`, a root of Sigma, from `statistics.directions.posterior_root`
            of the moments of the rows of training images' J, for one class and without a bias.
        select: which parameters.
        directions: K; None for the parameters themselves.
        probes: M; None for the logits themselves.
        seed: of both.

    Returns:
        `[B]`, squared logits, at most zero; higher is more in-distribution.

    Raises:
        ValueError: an option is out of range, or the root is for others.

    References:
        As of `scod`: https://arxiv.org/abs/2102.12567 and https://arxiv.org/abs/2409.15008.
    """
    found, root = to_common_float(
        logit_derivatives(
            model, images, select=select, directions=directions, probes=probes, seed=seed
        ),
        as_matrix("posterior_root", posterior_root, "P, R"),
    )
    check_width(found.reshape(-1, found.shape[-1]), len(root))
    projected = jnp.matmul(found, root, precision=lax.Precision.HIGHEST)
    return -squared_norm(projected.reshape(len(projected), -1))


@functools.partial(jax.jit, static_argnames=("of_logits", "directions", "select"))
def _along(
    of_logits: Callable[[jax.Array], jax.Array],
    model: Model,
    images: jax.Array,
    seed: int,
    *,
    directions: int,
    select: Select,
) -> jax.Array:
    """Derivatives `[K, B, ...]` of what is made of the logits, along K random directions."""
    check_count("directions", directions)
    leaves = leaves_by_name(model.params)
    chosen = {path: leaves[path] for path in selected_paths(model.params, select)}
    structure = jax.tree.structure(model.params)

    def outputs(chosen: dict[str, jax.Array]) -> jax.Array:
        params = jax.tree.unflatten(structure, (leaves | chosen).values())
        return of_logits(model.apply(params, images).logits)

    _, derivative = jax.linearize(outputs, chosen)

    def along(number: jax.Array) -> jax.Array:
        found: jax.Array = derivative(random_direction(seed, number, chosen))
        return found

    # One after another: batched, convolutions of many kernels would become one in groups.
    return lax.map(along, jnp.arange(directions)) / math.sqrt(directions)


def random_direction(
    seed: int | jax.Array, number: int | jax.Array, leaves: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Signs in place of the entries of some parameters: a direction, times sqrt(K)."""
    keys = jax.random.split(jax.random.fold_in(_key(seed, 0), number), len(leaves))
    return {
        path: _signs(key, leaf.shape).astype(leaf.dtype)
        for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }


def random_rows(seed: int | jax.Array, count: int, width: int) -> jax.Array:
    """Rows `[M, C]` of signs over sqrt(M), whose R^T R is on average the identity."""
    return _signs(_key(seed, 1), (count, width)) / math.sqrt(count)


@functools.partial(jax.jit, static_argnames="select")
def _rows_by_gradients(
    model: Model, images: jax.Array, rows: jax.Array, *, select: Select
) -> jax.Array:
    """The product `[B, M, P]` of rows `[M, C]` with the Jacobian."""

    def row_of(weights: jax.Array) -> jax.Array:
        loss = Partial(_weighted_logits, model.function, model.state, weights)
        gradients = per_example_grads(loss, model.params, images, select=select)
        return joined_rows(gradients)

    return jnp.moveaxis(lax.map(row_of, rows), 0, 1)


def _weighted_logits(
    function: Partial, state: Any, weights: jax.Array, params: Params, images: jax.Array
) -> jax.Array:
    logits, weights = to_common_float(function(Variables(params, state), images).logits, weights)
    return (logits * weights[None]).sum(axis=1)


def joined_rows(arrays: dict[str, jax.Array]) -> jax.Array:
    """Arrays `[B, *shape]` by path as one row `[B, P]` for each image, by the order of paths."""
    rows = [to_float32_at_least(arrays[path]) for path in sorted(arrays)]
    return jnp.concatenate([x.reshape(len(x), -1) for x in rows], axis=1)


def _key(seed: int | jax.Array, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of -1 and 1, the same in whatever precision is enabled."""
    bits = jax.random.bits(key, shape, jnp.uint32) & 1
    return 1 - 2 * bits.astype(jnp.float32)
