"""Scores of layers inside the network: their activations, and derivatives with respect to them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax.numerics import divide_or_zero, to_common_float, to_float32_at_least
from gradnorm_jax.per_example import Tap, per_example_grads, taps
from gradnorm_jax.per_example.sites import AFTER, operations
from gradnorm_jax.per_example.tapping import layer_sites
from gradnorm_jax.scores.arrays import project
from gradnorm_jax.scores.gradient import gradnorm_by_parameter
from gradnorm_jax.scores.projection import joined_rows
from gradnorm_jax.types import Model, Outputs, Variables, linear_head

Layers = Sequence[str] | int
"""Layers as `taps` selects them, or how many of the last parts of a network: see `parts`."""


class Coverage(NamedTuple):
    """How usual each state of each neuron is among training images.

    Attributes:
        edges: `[M + 1]`, increasing, of the bins of states.
        coverage: `[K, M]`, in [0, 1], 1 for the usual.
    """

    edges: jax.Array
    coverage: jax.Array


def parts(model: Model, images: Any, layers: Layers) -> tuple[str, ...]:
    """Names of layers for `taps`; of a number n, the outputs of the last n parts of the network.

    The parts are the modules at the root of the parameters, without the last layer: of a ResNet its
    stem and its stages.

    Raises:
        ValueError: there are not so many.
    """
    if not isinstance(layers, int):
        return tuple(layers)
    found = [site.name for site in layer_sites(model, images, f"{AFTER}*")]
    if model.head is not None:
        found = [name for name in found if name != f"{AFTER}{model.head.kernel[0]}"]
    if not 0 < layers <= len(found):
        raise ValueError(
            f"the last {layers} parts of the network are asked for, and it has {len(found)}: "
            f"{', '.join(found)}; give names (layers)"
        )
    return tuple(found[-layers:])


def pooled(x: jax.Array) -> jax.Array:
    """Means over all positions of the activations `[..., channels]` of an image."""
    return to_float32_at_least(x).reshape(-1, x.shape[-1]).mean(axis=0)


def layer_features(model: Model, images: jax.Array, layers: Layers = 4) -> dict[str, jax.Array]:
    """Activations of layers, averaged over positions.

    Costs a forward pass up to the last of the layers.

    Args:
        model: the network, whose activations have their channels last.
        images: `[B, ...]`.
        layers: which.

    Returns:
        `[B, channels]` by layer.
    """
    names = parts(model, images, layers)
    return taps(model, names, {"output"}, reduce=_pooled_output)(images)


def _pooled_output(name: str, tap: Tap) -> jax.Array:
    return pooled(tap.output)


def layer_norms(
    model: Model,
    images: jax.Array,
    *,
    select: str | Sequence[str] | None = None,
    ord: float = 2,
) -> jax.Array:
    r"""Logarithms of GradNorm, parameter by parameter.

    .. math:: \log \|\partial KL(u \| p) / \partial \theta_l\|_q

    Costs about as much as an ordinary gradient, three to five forward passes.

    Args:
        model: the network.
        images: `[B, ...]`.
        select: which parameters; None for all.
        ord: q, at least 0.5, or infinity.

    Returns:
        `[B, L]`, of L parameters, in the order of their paths.
    """
    return log_norms(gradnorm_by_parameter(model, images, select=select, ord=ord))


def log_norms(norms: Mapping[str, jax.Array]) -> jax.Array:
    """Logarithms of norms `[B]` as rows `[B, L]`, in the order of their paths."""
    rows = jnp.stack([norms[path] for path in sorted(norms)], axis=1)
    return jnp.log(jnp.maximum(rows, jnp.finfo(rows.dtype).tiny))


def layer_gradients(model: Model, images: jax.Array, *, select: str | Sequence[str]) -> jax.Array:
    """Gradients of the sum of the logits with respect to some parameters, as rows.

    Costs about three forward passes, and memory for all entries of every image.

    Args:
        model: the network.
        images: `[B, ...]`.
        select: which parameters.

    Returns:
        `[B, P]`, of P entries.
    """
    loss = jax.tree_util.Partial(_sum_of_logits, model.function, model.state)
    return joined_rows(per_example_grads(loss, model.params, images, select=select))


def _sum_of_logits(function: Any, state: Any, params: Any, images: jax.Array) -> jax.Array:
    return function(Variables(params, state), images).logits.sum(axis=-1)


def gaia_z(model: Model, images: jax.Array, *, layers: Sequence[str] | None = None) -> jax.Array:
    r"""Negative mean square of the fractions of derivatives that are not zero: GAIA-Z.

    .. math:: S = -\frac{1}{K} \sum_{l, k} r_{l, k}^2, \quad r_{l, k} = \frac{1}{H W} |\{(i, j):
        \partial \max_c z_c / \partial A_{l, k, i, j} \ne 0\}|

    over the K channels k of all layers l. Costs a forward and a backward pass, about three forward
    passes. What is exactly zero depends on the type: in bfloat16 derivatives underflow.

    Args:
        model: the network, whose activations have their channels last.
        images: `[B, ...]`.
        layers: whose outputs A are looked at, as `taps` selects them; by default all
            normalisations, or where there are none, as where they are folded into them, all layers
            but the last. The authors take those of CIFAR's networks, and of BiT those of block 4.

    Returns:
        `[B]`, in [-1, 0]; higher is more in-distribution.

    Raises:
        ValueError: the network has no rectifiers, and so no derivatives that are exactly zero.

    References:
        Chen et al. (2023), "GAIA: Delving into Gradient-based Attribution Abnormality for
        Out-of-distribution Detection". The authors' code chooses other layers for one of their
        data sets; here they are the same for all. https://arxiv.org/abs/2311.09620
    """
    if "relu" not in operations(jax.make_jaxpr(model.function)(model.variables, images)):
        raise ValueError(
            "gaia_z counts derivatives that are exactly zero, and a network without rectifiers has "
            "none: take gaia_a"
        )
    names = _normalisations(model, images, layers)
    read = taps(model, names, {"cotangent"}, scalar=_largest_logit, reduce=_squared_fractions)
    return -_mean_of(read(images))


def gaia_a(model: Model, images: jax.Array, *, layers: Sequence[str] | None = None) -> jax.Array:
    r"""Negative mean square of the derivatives of features over those of log probabilities: GAIA-A.

    .. math:: S = -\frac{1}{K} \sum_{l, k} \frac{i_{l, k}^2}{o^2}, \quad i_{l, k} = \frac{1}{H W}
        \sum_{i, j} \frac{\partial \sum_d h_d}{\partial A_{l, k, i, j}}, \quad o^2 = \frac{1}{D}
        \sum_d \Big|\frac{\partial \sum_c \log p_c}{\partial h_d}\Big|

    over the K channels k of all layers l. The second derivative is W (1 - C p), and costs nothing;
    all costs a forward and a backward pass, about three forward passes. The authors take features
    before they are averaged over positions, by the number of which their scores differ from these.

    Args:
        model: the network, with a linear last layer and channels last.
        images: `[B, ...]`.
        layers: as in `gaia_z`.

    Returns:
        `[B]`, at most zero; higher is more in-distribution.

    References:
        Chen et al. (2023), as of `gaia_z`. https://arxiv.org/abs/2311.09620
    """
    names = _normalisations(model, images, layers)
    read = taps(model, names, {"cotangent"}, scalar=_sum_of_features, reduce=_squared_means)
    inner = _mean_of(read(images))
    logits, kernel = to_common_float(model(images).logits, linear_head(model).kernel)
    slope = project(1 - logits.shape[1] * jax.nn.softmax(logits), kernel.T)
    return -divide_or_zero(inner, jnp.abs(slope).mean(axis=1))


def _normalisations(
    model: Model, images: jax.Array, layers: Sequence[str] | None
) -> tuple[str, ...]:
    if layers is not None:
        return tuple(layers)
    sites = layer_sites(model, images)
    norms = tuple(site.name for site in sites if not site.is_product)
    return norms or tuple(site.name for site in sites[:-1])


def _largest_logit(outputs: Outputs) -> jax.Array:
    return outputs.logits.max(axis=-1)


def _sum_of_features(outputs: Outputs) -> jax.Array:
    return outputs.features.sum(axis=-1)


def _squared_fractions(name: str, tap: Tap) -> jax.Array:
    return pooled((tap.cotangent != 0).astype(jnp.float32)) ** 2


def _squared_means(name: str, tap: Tap) -> jax.Array:
    return pooled(tap.cotangent) ** 2


def _mean_of(rows: dict[str, jax.Array]) -> jax.Array:
    """Over the entries of all rows `[B, K]` together."""
    return jnp.concatenate(list(to_common_float(*rows.values())), axis=1).mean(axis=1)


def neuron_states(
    model: Model, images: jax.Array, layers: Layers = 4, steepness: float | Sequence[float] = 100.0
) -> dict[str, jax.Array]:
    r"""States of neurons: an activation times the derivative with respect to it, in (0, 1).

    .. math:: \sigma\Big(\alpha \, \bar A_{l, k} \, \overline{\partial KL(u \| p) / \partial
        A_{l, k}}\Big)

    Costs a forward and a backward pass down to the first of the layers, at most about three forward
    passes.

    Args:
        model: the network, whose activations have their channels last.
        images: `[B, ...]`.
        layers: which.
        steepness: alpha of all layers, or of each.

    Returns:
        `[B, channels]` by layer, the means being over positions.

    Raises:
        ValueError: there is not one steepness for each layer.
    """
    names = parts(model, images, layers)
    slopes = [steepness] * len(names) if isinstance(steepness, float | int) else list(steepness)
    if len(slopes) != len(names):
        raise ValueError(f"{len(slopes)} values of steepness are given for {len(names)} layers")
    products = taps(model, names, {"output", "cotangent"}, reduce=_product_of_means)(images)
    return {n: jax.nn.sigmoid(a * products[n]) for n, a in zip(names, slopes, strict=True)}


def _product_of_means(name: str, tap: Tap) -> jax.Array:
    return pooled(tap.output) * pooled(tap.cotangent)


def nac_layers(states: dict[str, jax.Array], coverage: Coverage) -> jax.Array:
    """NAC-UE over several layers: how many neurons are in a usual state.

    Args:
        states: `[B, channels]` by layer, from `neuron_states`.
        coverage: of training images.

    Returns:
        `[B]`, the mean over layers of the mean of a layer's coverage, in [0, 1]; higher is more
        in-distribution.

    References:
        Liu et al. (2024), "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and
        Generalization". Some versions of the authors' code sum over positions instead of averaging,
        which is another steepness. https://arxiv.org/abs/2306.02879
    """
    edges, usual, *rows = to_common_float(*coverage, *states.values())
    found, first = [], 0
    num_bins = usual.shape[1]
    for each in rows:
        bins = (jnp.searchsorted(edges, each, side="right") - 1).clip(0, num_bins - 1)
        width = each.shape[1]
        own = jnp.arange(first, first + width, dtype=bins.dtype)
        found.append(usual.reshape(-1)[own[None] * num_bins + bins].mean(axis=1))
        first += width
    return jnp.stack(found).mean(axis=0)
