"""Detectors of inner layers: GAIA, NAC, Mahalanobis distances."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, images_of
from gradnorm_jax.detectors.network_pass import NetworkPass
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.numerics import check_count, check_step
from gradnorm_jax.scores.inner import Coverage, parts
from gradnorm_jax.scores.layer_distances import LayerRegression
from gradnorm_jax.statistics.bank import bank, bank_rows
from gradnorm_jax.statistics.class_moments import CLASS_SUMS, tied_gaussians
from gradnorm_jax.statistics.moments import MOMENTS
from gradnorm_jax.statistics.readings import Read, of_reading
from gradnorm_jax.statistics.regression import logistic_regression
from gradnorm_jax.statistics.state_counts import state_counts, state_coverage
from gradnorm_jax.types import LinearHead, Model

_ATTACKED = 1000
"""How many training images the regression is fitted to; the paper's number is 500."""


@builder
def gaia_z(*, layers: Sequence[str] | None = None) -> Detector:
    """Fractions of derivatives that are not zero; see `scores.gaia_z`.

    About three forward passes.

    Args:
        layers: which, as `taps` selects them; by default all normalisations.
    """
    return Detector("gaia_z", "network", _gaia_z, options={"layers": layers})


@builder
def gaia_a(*, layers: Sequence[str] | None = None) -> Detector:
    """Derivatives of features over those of log probabilities; see `scores.gaia_a`.

    About three forward passes.

    Args:
        layers: which, as `taps` selects them; by default all normalisations.
    """
    return Detector("gaia_a", "network", _gaia_a, options={"layers": layers})


@builder
def nac_layers(
    *,
    layers: int | Sequence[str] = 4,
    bins: int = 50,
    steepness: float | Sequence[float] = 100.0,
    usual: float = 0.01,
) -> Detector:
    """Neuron activation coverage of several layers; see `scores.nac_layers`.

    About three forward passes.

    Args:
        layers: which, as `taps` selects them, or how many of the last parts of the network.
        bins: M, for how many edges of bins; rounded down to an even number.
        steepness: alpha of the sigmoid, of all layers or of each; the paper searches it on
            validation data, from 0.01 to 3,000 for the stages of a ResNet-50.
        usual: the fraction of training images whose being in a state makes it usual.

    Raises:
        ValueError: an option is out of range.
    """
    if bins < 4:
        raise ValueError(f"bins must be at least 4, got {bins}")
    if not 0 < usual <= 1:
        raise ValueError(f"usual must lie in (0, 1], got {usual!r}")
    options = {
        "states": NetworkPass(scores.neuron_states, {"layers": layers, "steepness": steepness})
    }
    name = f"neuron_states(layers={layers},steepness={steepness})"
    fit = _coverage(Reading(name, _states, options=options), bins, usual)
    return Detector("nac_layers", "network", _nac_layers, fit, options)


@builder
def mahalanobis_layers(
    *, layers: int | Sequence[str] = 5, magnitude: float = 0.0014, noise: float = 0.05
) -> Detector:
    """Mahalanobis distances of several layers, weighed by a regression; see the score.

    The paper's baseline, `scores.mahalanobis_layers` of `scores.layer_distances`. It is fitted in
    two passes: Gaussians, and then a logistic regression that tells 1,000 training images from the
    same after an attack. About four forward passes a layer; one for all if the magnitude is zero.

    Args:
        layers: which, as `taps` selects them, or how many of the last parts of the network.
        magnitude: of the step that raises each layer's score, in the units of the network's input;
            `tune` it on validation data, the paper's grid being `scores.MAGNITUDES`.
        noise: of the attack, in the same units.

    Raises:
        ValueError: an option is out of range.
    """
    check_step(magnitude)
    check_step(noise)
    names = tuple(range(-layers, 0)) if isinstance(layers, int) else tuple(layers)
    check_count("layers", len(names))
    options = {"layers": layers, "magnitude": magnitude}
    fit = _regression(names, layers if isinstance(layers, int) else names, magnitude, noise)
    return Detector("mahalanobis_layers", "network", _mahalanobis_layers, fit, options)


@functools.cache
def _coverage(reading: Reading, bins: int, usual: float) -> Fit:
    def finalize(head: LinearHead, found: Read) -> Coverage:
        return state_coverage(found.value, bins, usual)

    return Fit((of_reading(state_counts(bins), reading),), finalize)


@functools.cache
def _gaussians(names: tuple[int | str, ...]) -> Fit:
    """What tells the Gaussians of several layers."""
    count = len(names)
    readings = [
        Reading(f"layer {layer} of {count}", _layer, options={"layer": layer, "count": count})
        for layer in names
    ]
    statistics = [of_reading(s, reading) for reading in readings for s in (MOMENTS, CLASS_SUMS)]

    def finalize(head: LinearHead, *values: Read) -> tuple[scores.TiedGaussians, ...]:
        found = [each.value for each in values]
        return tuple(map(tied_gaussians, found[::2], found[1::2]))

    return Fit(tuple(statistics), finalize)


@functools.cache
def _regression(
    names: tuple[int | str, ...], layers: int | tuple[str, ...], magnitude: float, noise: float
) -> Fit:
    gaussians = _gaussians(names)
    options = {"layers": layers, "magnitude": magnitude, "noise": noise}
    reading = Reading(f"layer_distances({options})", _both_distances, gaussians, options)

    def finalize(head: LinearHead, *values: Read) -> LayerRegression:
        *before, sample = values
        rows = bank_rows(sample.value, _ATTACKED).features
        weights, bias = logistic_regression(*_halves(rows))
        fitted = gaussians.finalize(head, *before)
        return LayerRegression(fitted, jnp.asarray(weights), jnp.asarray(bias))

    return Fit((*gaussians.statistics, of_reading(bank(_ATTACKED), reading)), finalize)


def _halves(rows: Any) -> tuple[Any, Any]:
    """Distances of images, and of the same after an attack."""
    width = rows.shape[1] // 2
    return rows[:, :width], rows[:, width:]


def _layer(state: None, model: Model, batch: Batch, *, layer: int | str, count: int) -> jax.Array:
    """Features of one layer, by its name or by which of the last parts of the network it is."""
    images = images_of(batch)
    name = layer if isinstance(layer, str) else parts(model, images, count)[layer]
    return scores.layer_features(model, images, (name,))[name]


def _both_distances(
    state: Any, model: Model, batch: Batch, *, noise: float, **options: Any
) -> jax.Array:
    images = images_of(batch)
    moved = scores.attacked(model, images, noise=noise)
    found = [scores.layer_distances(model, x, state, **options) for x in (images, moved)]
    return jnp.concatenate(found, axis=1)


def _mahalanobis_layers(
    state: LayerRegression, model: Model, batch: Batch, **options: Any
) -> jax.Array:
    distances = scores.layer_distances(model, images_of(batch), state.gaussians, **options)
    return scores.mahalanobis_layers(distances, state)


def _states(state: None, model: Model, batch: Batch, *, states: NetworkPass) -> jax.Array:
    return jnp.concatenate(list(states(model, batch).values()), axis=1)


def _nac_layers(state: Coverage, model: Model, batch: Batch, *, states: NetworkPass) -> jax.Array:
    return scores.nac_layers(states(model, batch), state)


def _gaia_z(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.gaia_z(model, images_of(batch), **options)


def _gaia_a(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.gaia_a(model, images_of(batch), **options)
