"""Detectors of the gradient space: projections onto where training gradients lie."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, images_of
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.numerics import check_count
from gradnorm_jax.statistics.average_gradients import (
    GradientSums,
    average_gradients,
    gradient_sums,
)
from gradnorm_jax.statistics.cells import CELLS, Cells, cell_subspace
from gradnorm_jax.statistics.class_moments import CLASS_SUMS, ClassSums
from gradnorm_jax.statistics.directions import check_share, leading_directions, principal_subspace
from gradnorm_jax.statistics.moments import MOMENTS, Moments
from gradnorm_jax.statistics.readings import Read, of_reading
from gradnorm_jax.types import LinearHead, Model


@builder
def gradorth(*, share: float = 0.97, layers: Sequence[str] | None = None) -> Detector:
    """Norm of the gradient within the subspace of training features; see `scores.gradorth`.

    Args:
        share: of the features' mean square that the subspace holds.
        layers: dense or convolutional layers whose gradients are projected onto the subspaces of
            their own inputs, in place of the last; see `scores.gradorth_of_layers`. At most about
            three forward passes. It learns a square matrix for each, as wide as its kernel has
            weights for one output: 170 MB for 3 x 3 weights of 512 channels.

    Raises:
        ValueError: an option is out of range.
    """
    check_share(share)
    if layers is not None:
        names = tuple(layers)
        check_count("layers", len(names))
        fit = _layers_fit(names, share)
        return Detector("gradorth", "network", _gradorth_of_layers, fit, {"layers": names})
    return Detector("gradorth", "outputs", _gradorth, _gradorth_fit(share))


@builder
def gradpca(*, aggregate: Literal["sum", "max"] = "sum", share: float = 0.99) -> Detector:
    """Fraction of the gradient within the principal subspace of class means.

    Args:
        aggregate: the gradient of the sum of the logits, `scores.gradpca`, as the paper's code has
            it, or of the largest, `scores.gradpca_max`, as its text.
        share: of the variance of class means that the subspace holds.

    Raises:
        ValueError: an option is out of range.
    """
    check_share(share)
    if aggregate == "max":
        return Detector("gradpca", "outputs", _gradpca_max, _gradpca_max_fit(share))
    return Detector("gradpca", "outputs", _gradpca, _gradpca_fit(share))


@builder
def average_gradient(*, rank: int = 64) -> Detector:
    """Largest cosine with a class's mean gradient; see `scores.average_gradient`.

    Args:
        rank: of how many directions gradients keep where the last layer has more features, or more
            classes. Memory grows with its square times the number of classes.

    Raises:
        ValueError: an option is out of range.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return Detector("average_gradient", "outputs", _average_gradient, _average_fit(rank))


@functools.cache
def _gradorth_fit(share: float) -> Fit:
    def finalize(head: LinearHead, moments: Moments) -> jax.Array:
        return leading_directions(moments, share)

    return Fit((MOMENTS,), finalize)


@functools.cache
def _layers_fit(layers: tuple[str, ...], share: float) -> Fit:
    readings = [Reading(f"inputs of {each}", _inputs, options={"layer": each}) for each in layers]

    def finalize(head: LinearHead, *values: Read) -> tuple[jax.Array, ...]:
        return tuple(leading_directions(each.value, share) for each in values)

    return Fit(tuple(of_reading(MOMENTS, each) for each in readings), finalize)


def _inputs(state: None, model: Model, batch: Batch, *, layer: str) -> jax.Array:
    return scores.layer_inputs(model, images_of(batch), layer)


def _gradorth_of_layers(
    state: tuple[jax.Array, ...], model: Model, batch: Batch, *, layers: tuple[str, ...]
) -> jax.Array:
    return scores.gradorth_of_layers(model, images_of(batch), state, layers=layers)


def _gradorth(state: jax.Array, model: Model, batch: Batch) -> jax.Array:
    return scores.gradorth(*batch.outputs, state)


@functools.cache
def _gradpca_fit(share: float) -> Fit:
    def finalize(head: LinearHead, sums: ClassSums) -> scores.Subspace:
        return principal_subspace(sums, share)

    return Fit((CLASS_SUMS,), finalize)


def _gradpca(state: scores.Subspace, model: Model, batch: Batch) -> jax.Array:
    return scores.gradpca(batch.outputs.features, state)


@functools.cache
def _gradpca_max_fit(share: float) -> Fit:
    def finalize(head: LinearHead, cells: Cells) -> scores.CellSubspace:
        return cell_subspace(cells, share)

    return Fit((CELLS,), finalize)


def _gradpca_max(state: scores.CellSubspace, model: Model, batch: Batch) -> jax.Array:
    return scores.gradpca_max(*batch.outputs, state)


@functools.cache
def _average_fit(rank: int) -> Fit:
    return Fit((gradient_sums(rank),), _average)


def _average(head: LinearHead, sums: GradientSums) -> scores.AverageGradients:
    return average_gradients(sums)


def _average_gradient(state: scores.AverageGradients, model: Model, batch: Batch) -> jax.Array:
    return scores.average_gradient(*batch.outputs, state)
