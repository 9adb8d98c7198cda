"""Detectors of the gradient space: GradNorm and its two factors."""

from collections.abc import Sequence
from typing import Any

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, images_of
from gradnorm_jax.detectors.network_pass import NetworkPass
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.norms import combine_norms
from gradnorm_jax.numerics import check_order, check_temperature
from gradnorm_jax.types import Model


@builder
def gradnorm(
    *,
    temperature: float = 1.0,
    ord: float = 1.0,
    include_bias: bool = False,
    autodiff: bool = False,
    select: str | Sequence[str] | None = None,
) -> Detector:
    """GradNorm of the last layer in closed form, or of any parameters.

    Args:
        temperature: T of the softmax.
        ord: order of the norm.
        include_bias: of the last layer, its bias too; not together with `select`.
        autodiff: by the definition, `scores.gradnorm_by_autodiff`, instead of `scores.gradnorm`.
        select: parameters other than the last layer's kernel: a path pattern such as "block4" or
            several, or "all"; see `scores.gradnorm_of_parameters`.

    Raises:
        ValueError: an option is out of range, or two of them exclude each other.
    """
    check_temperature(temperature)
    check_order(ord)
    options: dict[str, Any] = {"temperature": temperature, "ord": ord}
    if select is not None:
        if include_bias or autodiff:
            raise ValueError("select chooses the parameters: leave out include_bias and autodiff")
        norms = gradnorm_pass(select=select, **options)
        return Detector("gradnorm", "network", _of_parameters, options={"norms": norms, "ord": ord})
    options["include_bias"] = include_bias
    if autodiff:
        return Detector("gradnorm", "network", _by_autodiff, options=options)
    return Detector("gradnorm", "outputs", _closed_form, options=options)


def gradnorm_pass(
    *,
    select: str | Sequence[str] | None = None,
    temperature: float = 1.0,
    ord: float = 1.0,
) -> NetworkPass:
    """The pass that reads GradNorm of each parameter, `{path: [B]}`; one whatever is selected.

    Args:
        select: which parameters, by a path pattern or several; "all" or None for all.
        temperature: T of the softmax.
        ord: order of the norms.
    """
    selected = None if select == "all" else select
    options = {"select": selected, "temperature": float(temperature), "ord": float(ord)}
    return NetworkPass(scores.gradnorm_by_parameter, options)


@builder
def feature_norm(*, ord: float = 1.0) -> Detector:
    """The factor of GradNorm that the features contribute, alone; see `scores.feature_norm`.

    Args:
        ord: order of the norm.

    Raises:
        ValueError: an option is out of range.
    """
    check_order(ord)
    return Detector("feature_norm", "outputs", _feature_norm, options={"ord": ord})


@builder
def residual_norm(*, temperature: float = 1.0, ord: float = 1.0) -> Detector:
    """The factor of GradNorm that the softmax contributes, alone; see `scores.residual_norm`.

    Args:
        temperature: T of the softmax.
        ord: order of the norm.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    check_order(ord)
    options = {"temperature": temperature, "ord": ord}
    return Detector("residual_norm", "logits", _residual_norm, options=options)


def _feature_norm(state: None, model: Model, batch: Batch, *, ord: float) -> jax.Array:
    return scores.feature_norm(batch.outputs.features, ord=ord)


def _residual_norm(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.residual_norm(batch.outputs.logits, **options)


def _closed_form(
    state: None, model: Model, batch: Batch, *, include_bias: bool, **options: Any
) -> jax.Array:
    if include_bias and (model.head is None or model.head.bias is None):
        raise ValueError(
            "include_bias is set, but the model's last layer has no bias: leave the option out"
        )
    features, logits = batch.outputs
    return scores.gradnorm(features, logits, include_bias=include_bias, **options)


def _by_autodiff(
    state: None, model: Model, batch: Batch, *, include_bias: bool, **options: Any
) -> jax.Array:
    return scores.gradnorm_by_autodiff(
        model, images_of(batch), include_bias=include_bias, **options
    )


def _of_parameters(
    state: None, model: Model, batch: Batch, *, norms: NetworkPass, ord: float
) -> jax.Array:
    return combine_norms(norms(model, batch), ord=ord)
