"""RankFeat: the energy without the strongest component of inner activations."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from gradnorm_jax.numerics import check_count, divide_or_zero, to_float32_at_least
from gradnorm_jax.per_example import edited
from gradnorm_jax.scores.inner import Layers, parts
from gradnorm_jax.scores.output import energy
from gradnorm_jax.types import Model


def rankfeat(
    model: Model, images: jax.Array, *, layers: Layers = 2, iterations: int = 20
) -> jax.Array:
    r"""Energy of logits from which the first singular component of inner activations is missing.

    .. math:: S = \log \sum_c e^{\bar z_c}, \quad \bar z = \frac{1}{L} \sum_l z(X_l - \sigma_1 u_1
        v_1^T)

    where X_l `[channels, positions]` are the activations of layer l, in whose place the network
    goes on from what is left of them, one layer at a time. The component is found by power
    iteration from a fixed start, for each image by itself. Costs at most a forward pass a layer.

    Args:
        model: the network, whose activations have their channels last.
        images: `[B, ...]`.
        layers: which; the last two parts of the network by default. For BiT, whose last
            normalisation is a part of its own, the paper's are "after:block3" and "after:block4".
        iterations: of the power iteration, each a product with X and one with X^T.

    Returns:
        `[B]` in the units of the logits; higher is more in-distribution.

    Raises:
        ValueError: a layer has no positions, or `iterations` is not at least 1.

    References:
        Song, Sebe, Wang (2022), "RankFeat: Rank-1 Feature Removal for Out-of-distribution
        Detection". The authors' code starts the iteration at random, or takes a singular value
        decomposition. https://arxiv.org/abs/2209.08590
    """
    check_count("iterations", iterations)
    # Bound as an array, the number is no part of what is compiled.
    edit = Partial(_without_first_component, jnp.asarray(iterations, jnp.int32))
    names = parts(model, images, layers)
    logits = [edited(model, name, edit)(images).logits for name in names]
    return energy(jnp.stack(list(map(to_float32_at_least, logits))).mean(axis=0))


def _without_first_component(iterations: jax.Array, name: str, output: jax.Array) -> jax.Array:
    if output.ndim < 2:
        raise ValueError(
            f"{name} has activations {list(output.shape)}, a single row, of which nothing is left "
            "without its first component: give layers before positions are averaged"
        )
    matrix = to_float32_at_least(output).reshape(-1, output.shape[-1])
    key = jax.random.key(0, impl="threefry2x32")
    start = jax.random.normal(key, (len(matrix),), jnp.float32).astype(matrix.dtype)

    def step(_: jax.Array, u: jax.Array) -> jax.Array:
        return _unit(_dot(matrix, _unit(_dot(u, matrix))))

    u = lax.fori_loop(0, iterations, step, start)
    # With u of length one, u^T X is sigma_1 v_1^T.
    left = matrix - u[:, None] * _dot(u, matrix)[None]
    return left.reshape(output.shape).astype(output.dtype)


def _unit(x: jax.Array) -> jax.Array:
    return divide_or_zero(x, jnp.linalg.norm(x))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
