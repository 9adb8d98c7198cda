"""GradNorm: the norm of the last layer's gradient, by definition and in closed form.

With features h `[D]`, logits z = W^T h + b, p = softmax(z / T) and a target distribution q (uniform
unless given), the gradient of KL(q || p) with respect to W is the outer product h (p - q)^T / T.
Every entrywise norm of it is therefore ||h|| ||p - q|| / T, and costs a forward pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.losses import (
    cross_entropy,
    kl_to_uniform,
    softmax_minus_target,
    softmax_minus_uniform,
)
from gradnorm_jax.norms import combine_norms, entrywise_norm
from gradnorm_jax.numerics import as_rows, check_order, check_temperature, to_float32_at_least
from gradnorm_jax.per_example import per_example_grad_norms, per_example_grads
from gradnorm_jax.tree import Params, Select, get_leaf, replace_leaf, show_path
from gradnorm_jax.types import Model, Variables


def gradnorm(
    features: ArrayLike,
    logits: ArrayLike,
    *,
    temperature: float = 1.0,
    ord: float = 1.0,
    include_bias: bool = False,
    target: ArrayLike | None = None,
) -> jax.Array:
    r"""GradNorm in closed form, from one forward pass.

    .. math:: S = \|\partial KL(u \| p) / \partial W\|_q = \|h\|_q \, \|p - u\|_q / T

    Equal to `gradnorm_by_autodiff`, but no gradient is ever formed.

    Args:
        features: `[B, D]`, the input h of the last layer.
        logits: `[B, C]`, its output.
        temperature: T > 0.
        ord: order q >= 0.5 of the entrywise norm, or infinity.
        include_bias: take the norm over the gradients of kernel and bias together.
        target: `[B, C]` or `[1, C]`, distributions to use in place of the uniform one; see
            `one_hot_prediction` and `smoothed_prediction`.

    Returns:
        `[B]`, nats per unit of weight, >= 0; higher is more in-distribution.

    Raises:
        ValueError: the temperature or the order is out of range, a shape is not as above, or there
            are no features.

    References:
        Huang, Geng, Li (2021), equations 6 to 9. Their code backpropagates an all-ones target,
        whose scores are C times these; rankings are the same.
        https://arxiv.org/abs/2110.00218
    """
    features, logits = _as_features(features), as_rows("logits", logits, "C")
    if len(features) != len(logits):
        raise ValueError(
            "features and logits must have a row for each image, got shapes "
            f"{features.shape} and {logits.shape}"
        )
    u = feature_norm(features, ord=ord, include_bias=include_bias)
    v = residual_norm(logits, temperature=temperature, ord=ord, target=target)
    return u * v / temperature


def feature_norm(features: ArrayLike, *, ord: float = 1.0, include_bias: bool = False) -> jax.Array:
    """The factor U = ||h|| of GradNorm that the feature space contributes.

    Args:
        features: `[B, D]`.
        ord: order q >= 0.5 of the norm, or infinity.
        include_bias: append the constant 1 by which a bias is multiplied.

    Returns:
        `[B]`, >= 0; higher is more in-distribution.

    Raises:
        ValueError: the order is out of range, or the features are not `[B, D]`.

    References:
        Huang, Geng, Li (2021), equation 8.
    """
    features = _as_features(features)
    if include_bias:
        features = jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)
    return entrywise_norm(features, ord=ord)


def residual_norm(
    logits: ArrayLike,
    *,
    temperature: float = 1.0,
    ord: float = 1.0,
    target: ArrayLike | None = None,
) -> jax.Array:
    """The factor V = ||p - q|| of GradNorm that the output space contributes.

    Args:
        logits: `[B, C]`.
        temperature: T > 0.
        ord: order of the norm, >= 0.5, or infinity.
        target: `[B, C]` or `[1, C]`, the distribution q; uniform if None.

    Returns:
        `[B]`, >= 0 and at most 2 for the 1-norm; higher is more in-distribution.

    Raises:
        ValueError: the temperature or the order is out of range, or a shape is not as above.

    References:
        Huang, Geng, Li (2021), equation 9, whose V is C times this.
    """
    logits = as_rows("logits", logits, "C")
    if target is None:
        residual = softmax_minus_uniform(logits, temperature=temperature)
    else:
        rows = _as_targets(target, logits.shape)
        residual = softmax_minus_target(logits, rows, temperature=temperature)
    return entrywise_norm(residual, ord=ord)


def _as_features(features: ArrayLike | None) -> jax.Array:
    if features is None:
        raise ValueError(
            "features is None, as for a model without a linear last layer: its gradients have no "
            "closed form; take gradnorm_of_parameters(model, images, select=...) instead"
        )
    return as_rows("features", features, "D")


def _as_targets(target: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """The targets as `[B, C]`, which is `shape`, from those or from `[1, C]`."""
    rows = as_rows("target", target, "C")
    if rows.shape not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"target must be [B, C], like the logits of shape {shape}, or [1, C], got shape "
            f"{rows.shape}"
        )
    return jnp.broadcast_to(rows, shape)


def gradnorm_by_autodiff(
    model: Model,
    images: jax.Array,
    *,
    temperature: float = 1.0,
    ord: float = 1.0,
    include_bias: bool = False,
    target: ArrayLike | None = None,
) -> jax.Array:
    """GradNorm by its definition: `jax.grad` of the loss for every example, then the norm.

    It differentiates the network's own logits with respect to its own last layer, and holds
    `[B, D, C]` gradients; `gradnorm` gives the same numbers without them. Where the network uses
    the kernel's array in other places too, as one with tied embeddings does, the gradient is the
    sum over all of them, and so differs from the closed form, which is of the last layer alone.

    Args:
        model: the network.
        images: `[B, ...]`, which may be split over devices.
        temperature: T > 0.
        ord: order of the entrywise norm, >= 0.5, or infinity.
        include_bias: take the norm over the gradients of kernel and bias together.
        target: `[B, C]` or `[1, C]`, distributions to use in place of the uniform one.

    Returns:
        `[B]`, nats per unit of weight, >= 0; higher is more in-distribution.

    Raises:
        ValueError: the temperature or the order is out of range, the target has another shape, the
            model has no linear last layer, or there is no bias to include.

    References:
        Huang, Geng, Li (2021), equations 4 and 5.
    """
    check_temperature(temperature)
    check_order(ord)
    head = model.head
    if head is None:
        raise ValueError(
            "the model has no linear last layer to differentiate by; take "
            "gradnorm_of_parameters(model, images, select=...) instead"
        )
    if include_bias and head.bias is None:
        raise ValueError("include_bias is set, but the model's last layer has no bias")
    paths = [head.kernel, *([head.bias] if include_bias and head.bias else [])]
    params = model.params
    for path in paths:
        params = replace_leaf(params, path, to_float32_at_least(get_leaf(params, path)))
    images = jnp.asarray(images)
    if target is not None:
        target = _as_targets(target, jax.eval_shape(model, images).logits.shape)
    gradients = per_example_grads(
        # Bound, the model's arrays stay arguments of the compiled program.
        jax.tree_util.Partial(_loss_to_target, model.function, model.state, temperature),
        params,
        (images, target),
        select={show_path(path) for path in paths}.__contains__,
    )
    norms = {path: entrywise_norm(each, ord=ord) for path, each in gradients.items()}
    return combine_norms(norms, ord=ord)


def _loss_to_target(
    function: jax.tree_util.Partial,
    state: Any,
    temperature: float,
    params: Params,
    batch: tuple[jax.Array, jax.Array | None],
) -> jax.Array:
    images, target = batch
    logits = function(Variables(params, state), images).logits
    if target is None:
        return kl_to_uniform(logits, temperature=temperature)
    return cross_entropy(logits, target, temperature=temperature)


def gradnorm_of_parameters(
    model: Model,
    images: jax.Array,
    *,
    select: Select = None,
    temperature: float = 1.0,
    ord: float = 1.0,
    microbatch_size: int | None = None,
) -> jax.Array:
    """The norm of each example's gradient of KL(u || p) with respect to any parameters.

    The paper's study of layers: a block, all parameters, the last layer with its bias.

    Args:
        model: the network.
        images: `[B, ...]`.
        select: path patterns such as "block4" or "head", or a predicate; None for all parameters.
            See `per_example_grad_norms`.
        temperature: T > 0.
        ord: order of the entrywise norm over all selected parameters together.
        microbatch_size: how many examples to go through at a time; all by default.

    Returns:
        `[B]`, nats per unit of weight, >= 0; higher is more in-distribution.

    Raises:
        ValueError: the temperature or the order is out of range, or nothing is selected.

    References:
        Huang, Geng, Li (2021), section 5.
    """
    norms = gradnorm_by_parameter(
        model,
        images,
        select=select,
        temperature=temperature,
        ord=ord,
        microbatch_size=microbatch_size,
    )
    return combine_norms(norms, ord=ord)


def gradnorm_by_parameter(
    model: Model,
    images: jax.Array,
    *,
    select: Select = None,
    temperature: float = 1.0,
    ord: float = 1.0,
    microbatch_size: int | None = None,
) -> dict[str, jax.Array]:
    """The norms of each example's gradient of KL(u || p) with respect to each parameter.

    `combine_norms` of any of them is `gradnorm_of_parameters`, whose arguments these are: groups of
    parameters cost one pass.

    Returns:
        `{path: [B]}`, nats per unit of weight, >= 0.

    Raises:
        ValueError: the temperature or the order is out of range, or nothing is selected.
    """
    check_temperature(temperature)
    return per_example_grad_norms(
        kl_loss(model, temperature),
        model.params,
        images,
        ord=ord,
        select=select,
        microbatch_size=microbatch_size,
    )


def kl_loss(model: Model, temperature: float = 1.0) -> jax.tree_util.Partial:
    """The loss `(params, images) -> [B]` whose gradients GradNorm measures."""
    # Bound, the model's arrays stay arguments of the compiled program.
    return jax.tree_util.Partial(_kl_of_images, model.function, model.state, temperature)


def _kl_of_images(
    function: jax.tree_util.Partial,
    state: Any,
    temperature: float,
    params: Params,
    images: jax.Array,
) -> jax.Array:
    logits = function(Variables(params, state), images).logits
    return kl_to_uniform(logits, temperature=temperature)


def one_hot_prediction(logits: ArrayLike) -> jax.Array:
    """The target that puts all weight on the predicted class: `[B, C] -> [B, C]`."""
    rows = as_rows("logits", logits, "C")
    return jax.nn.one_hot(rows.argmax(axis=-1), rows.shape[-1], dtype=rows.dtype)


def smoothed_prediction(logits: ArrayLike, *, smoothing: float = 0.1) -> jax.Array:
    """The label-smoothed predicted class, (1 - a) one_hot + a / C: `[B, C] -> [B, C]`.

    Raises:
        ValueError: the smoothing a is not in [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
    one_hot = one_hot_prediction(logits)
    return (1 - smoothing) * one_hot + smoothing / one_hot.shape[-1]
