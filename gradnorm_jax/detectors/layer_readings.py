"""Readings of inner layers and their gradients, for detectors that look at features."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, images_of
from gradnorm_jax.detectors.gradient import gradnorm_pass
from gradnorm_jax.detectors.network_pass import NetworkPass
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.numerics import check_count, check_order, unit_rows
from gradnorm_jax.scores.inner import log_norms
from gradnorm_jax.types import Model


@builder
def layer_norms(*, select: str | Sequence[str] | None = None, ord: float = 2.0) -> Reading:
    """Logarithms of GradNorm, parameter by parameter; see `scores.layer_norms`.

    Read before a detector of features, `layer_norms+knn`, and alone before `gaussian`. About three
    to five forward passes.

    Args:
        select: which parameters, by a path pattern or several; all by default.
        ord: order of the norm.

    Raises:
        ValueError: an option is out of range.
    """
    check_order(ord)
    norms = gradnorm_pass(select=select, ord=ord)
    return Reading("layer_norms", _layer_norms, options={"norms": norms})


@builder
def layer_features(*, layers: int | Sequence[str] = 4) -> Reading:
    """Features of several layers, those of each of length one; see `scores.layer_features`.

    Read before a detector of features: `layer_features+knn`. About one forward pass.

    Args:
        layers: which, as `taps` selects them, or how many of the last parts of the network.
    """
    features = NetworkPass(scores.layer_features, {"layers": layers})
    return Reading("layer_features", _layer_features, options={"features": features})


@builder
def layer_gradients(*, select: str | Sequence[str]) -> Reading:
    """Gradients of the sum of the logits with respect to some parameters, as features.

    Read before a detector of features: `layer_gradients(select=block4/unit03/c)+gradpca` is deep
    GradPCA. About three forward passes; see `scores.layer_gradients`.

    Args:
        select: which parameters, by a path pattern or several. What is learned of them is as large
            as the number of classes times that of their entries.
    """
    return Reading("layer_gradients", _layer_gradients, options={"select": select})


@builder
def gradient_projection(
    *, directions: int = 16, select: str | Sequence[str] | None = None, seed: int = 0
) -> Reading:
    """The energy's gradient by many parameters, seen from random directions, as features.

    Read before a detector of features, `gradient_projection+knn`, and alone before `gaussian`. No
    gradient is formed. About two forward passes a direction; see `scores.gradient_projection`.

    Args:
        directions: how many.
        select: which parameters, by a path pattern or several; all by default.
        seed: of the directions.

    Raises:
        ValueError: an option is out of range.
    """
    check_count("directions", directions)
    options = {"directions": directions, "select": select, "seed": seed}
    return Reading("gradient_projection", _gradient_projection, options=options)


def _layer_norms(state: None, model: Model, batch: Batch, *, norms: NetworkPass) -> jax.Array:
    return log_norms(norms(model, batch))


def _layer_features(state: None, model: Model, batch: Batch, *, features: NetworkPass) -> jax.Array:
    found = features(model, batch)
    return jnp.concatenate([unit_rows(each) for each in found.values()], axis=1)


def _layer_gradients(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.layer_gradients(model, images_of(batch), **options)


def _gradient_projection(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.gradient_projection(model, images_of(batch), **options)
