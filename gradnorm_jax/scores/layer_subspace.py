"""GradOrth of any layers: their gradients within the subspaces of what goes into them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from gradnorm_jax.jaxprs import shape_of
from gradnorm_jax.numerics import to_common_float, to_float32_at_least
from gradnorm_jax.per_example import Tap, taps
from gradnorm_jax.per_example.analysis import ParameterUse
from gradnorm_jax.per_example.layers import matrices
from gradnorm_jax.per_example.sites import Site
from gradnorm_jax.per_example.tapping import layer_sites
from gradnorm_jax.types import Model


def gradorth_of_layers(
    model: Model, images: jax.Array, bases: Sequence[ArrayLike], *, layers: Sequence[str]
) -> jax.Array:
    r"""GradOrth: the norm of layers' gradients within the subspaces of training inputs.

    .. math:: S = \sqrt{\sum_l \|V_l^T \, \partial KL(u \| p) / \partial W_l\|_F^2}, \quad \partial
        KL / \partial W_l = X_l^T G_l

    with the inputs X_l of the layer, a row for each position of a convolution, and the derivatives
    G_l by its outputs. It is the norm of (X V)^T G: no gradient is formed. Costs a forward and a
    backward pass down to the first of the layers, at most about three forward passes. W is what
    the layer multiplies by: of a standardised kernel that, and not the parameter it is made of.

    Args:
        model: the network.
        images: `[B, ...]`.
        bases: `[K_l, R_l]` of each layer, the V of the rows of training inputs, from
            `statistics.directions.leading_directions` of their second moment.
        layers: names of dense or convolutional layers.

    Returns:
        `[B]`, nats per unit of weight, >= 0; higher is more in-distribution.

    Raises:
        ValueError: a layer is of another kind, a name stands for several, or there is not one
            basis for each.

    References:
        Behpour, Doan, Li et al. (2023), as of `gradorth`, which is this of the last layer, in
        closed form. https://arxiv.org/abs/2308.00310
    """
    return _gradorth(model, images, tuple(map(jnp.asarray, bases)), layers=tuple(layers))


@functools.partial(jax.jit, static_argnames="layers")
def _gradorth(
    model: Model, images: jax.Array, bases: tuple[jax.Array, ...], *, layers: tuple[str, ...]
) -> jax.Array:
    sites = {site.name: site for site in (_site(model, images, layer) for layer in layers)}
    named = dict(zip(sites, bases, strict=True))

    def squared_norm(bases: dict[str, jax.Array], name: str, tap: Tap) -> jax.Array:
        pair = _matrices(sites[name], tap.input, tap.cotangent)
        rows, slopes, basis = to_common_float(*pair, bases[name])
        return (_dot(_dot(rows, basis).T, slopes) ** 2).sum()

    read = taps(model, layers, {"input", "cotangent"}, reduce=Partial(squared_norm, named))
    return jnp.sqrt(jnp.stack(list(read(images).values())).sum(axis=0))


@functools.partial(jax.jit, static_argnames="layer")
def layer_inputs(model: Model, images: jax.Array, layer: str) -> jax.Array:
    """The rows of a layer's inputs, or as few others whose products add up to the same matrix.

    Costs a forward pass up to the layer.

    Args:
        model: the network.
        images: `[B, ...]`.
        layer: name of a dense or convolutional layer.

    Returns:
        `[B, R, K]` of R positions and K weights of an output; with more positions than weights,
        `[B, K, K]`, whose product A^T A is that of the rows.

    Raises:
        ValueError: the layer is of another kind, or its name stands for several.
    """
    site = _site(model, images, layer)

    def rows_of(name: str, tap: Tap) -> jax.Array:
        output = shape_of(site.output)
        rows, _ = _matrices(site, tap.input, jnp.zeros(output.shape, output.dtype))
        rows = to_float32_at_least(rows)
        return rows if len(rows) <= rows.shape[1] else jnp.linalg.qr(rows, mode="r")

    (found,) = taps(model, layer, {"input"}, reduce=rows_of)(images).values()
    return found


def _site(model: Model, images: jax.Array, layer: str) -> Site:
    found = layer_sites(model, images, layer)
    if len(found) != 1:
        names = ", ".join(site.name for site in found)
        raise ValueError(f"{layer} stands for {len(found)} layers, {names}: name one")
    (site,) = found
    grouped = site.equation.params.get("feature_group_count", 1) > 1
    same = shape_of(site.output).shape == shape_of(site.equation.outvars[0]).shape
    if grouped or not (site.is_product and same):
        raise ValueError(
            f"{layer} is no dense layer, nor a convolution without groups, and has no rows of "
            "inputs that its kernel multiplies: give another"
        )
    return site


def _matrices(site: Site, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X `[R, K]` and G `[R, O]` of one example."""
    if x.size != shape_of(site.input).size:
        raise ValueError(f"{site.name} lies in a loop: give a layer outside of one")
    position = next(i for i, atom in enumerate(site.equation.invars) if atom is not site.input)
    shapes = shape_of(site.input), shape_of(site.output)
    x, cotangent = (a.reshape(s.shape) for a, s in zip((x, cotangent), shapes, strict=True))
    return matrices(ParameterUse(site.equation, position), x, cotangent)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
