"""Detectors that move the input along its gradient: AdaSCALE, PRO, approximate mass."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, images_of
from gradnorm_jax.detectors.network_pass import NetworkPass
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.numerics import check_count, check_fraction, check_step, check_temperature
from gradnorm_jax.statistics.bank import Bank, bank, bank_rows
from gradnorm_jax.statistics.readings import Read, of_reading
from gradnorm_jax.types import LinearHead, Model

_SAMPLE = 5000


@builder
def adascale_a(
    *,
    low: float = 60.0,
    high: float = 85.0,
    k_shift: float = 0.01,
    k_activation: float = 0.05,
    fraction: float = 0.05,
    epsilon: float = 0.5,
    weight: float = 10.0,
) -> Detector:
    """Energy of scaled activations, scaled by how far features move; see `scores.adascale`.

    Fitted to at most 5,000 images, best ones that the network was not trained on. About three
    forward passes beside the shared one.

    Args:
        low: the smallest percentile.
        high: the largest; the paper searches it on validation data.
        k_shift: which fraction of the features counts for the shift.
        k_activation: which for the activation after it.
        fraction: of the numbers of an image that move.
        epsilon: by how much, in the units of the network's input.
        weight: of the shift.

    Raises:
        ValueError: an option is out of range.
    """
    return _adascale(
        "A",
        low,
        high,
        k_shift=k_shift,
        k_activation=k_activation,
        fraction=fraction,
        epsilon=epsilon,
        weight=weight,
    )


@builder
def adascale_l(
    *,
    low: float = 60.0,
    high: float = 85.0,
    k_shift: float = 0.01,
    k_activation: float = 0.05,
    fraction: float = 0.05,
    epsilon: float = 0.5,
    weight: float = 10.0,
) -> Detector:
    """As `adascale_a`, with the logits scaled in place of the activations."""
    return _adascale(
        "L",
        low,
        high,
        k_shift=k_shift,
        k_activation=k_activation,
        fraction=fraction,
        epsilon=epsilon,
        weight=weight,
    )


@builder
def pro(
    *,
    base: Literal["msp", "entropy", "gen"] = "entropy",
    steps: int | None = None,
    epsilon: float | None = None,
    temperature: float = 1.0,
) -> Detector:
    """The least score on the way down; see `scores.pro`.

    About two forward passes a step, and one more, beside the shared one.

    Args:
        base: which score.
        steps: how many; by default the paper's for that score, 2 for the entropy, 1 for `msp`, 3
            for `gen`.
        epsilon: the size of a step, in the units of the network's input; by default the paper's,
            0.0014, 0.003 and 0.0001.
        temperature: of the softmax.

    Raises:
        ValueError: an option is out of range.
    """
    default_steps, default_epsilon = {"entropy": (2, 0.0014), "msp": (1, 0.003), "gen": (3, 1e-4)}[
        base
    ]
    steps = default_steps if steps is None else steps
    epsilon = default_epsilon if epsilon is None else epsilon
    check_count("steps", steps)
    check_step(epsilon)
    check_temperature(temperature)
    options = {"base": base, "steps": steps, "epsilon": epsilon, "temperature": temperature}
    return Detector("pro", "network", _pro, options=options)


@builder
def approximate_mass() -> Detector:
    """Negative length of the energy's input gradient; see `scores.approximate_mass`.

    About two forward passes beside the shared one.
    """
    return Detector("approximate_mass", "network", _approximate_mass)


def _adascale(variant: str, low: float, high: float, **shift: float) -> Detector:
    if not 0 <= low <= high < 100:
        raise ValueError(f"percentiles must be 0 <= low <= high < 100, got {low} and {high}")
    check_step(shift["epsilon"])
    for name in ("k_shift", "k_activation", "fraction"):
        check_fraction(name, shift[name])
    listed = ",".join(f"{name}={value}" for name, value in shift.items())
    shifted = NetworkPass(scores.adascale_shift, shift)
    reading = Reading(f"adascale_shift({listed})", _shift, options={"shift": shifted})
    options = {"variant": variant, "low": low, "high": high, "reading": reading}
    return Detector(f"adascale_{variant.lower()}", "network", _score, _shifts(reading), options)


@functools.cache
def _shifts(reading: Reading) -> Fit:
    return Fit((of_reading(bank(_SAMPLE), reading),), _sorted)


def _sorted(head: LinearHead, value: Read) -> jax.Array:
    found: Bank = value.value
    return jnp.asarray(np.sort(bank_rows(found, _SAMPLE).features[:, 0]))


def _shift(state: None, model: Model, batch: Batch, *, shift: NetworkPass) -> jax.Array:
    rows: jax.Array = shift(model, batch)
    return rows[:, None]


def _score(
    state: jax.Array, model: Model, batch: Batch, *, reading: Reading, **options: Any
) -> jax.Array:
    shift = reading(None, model, batch)[:, 0]
    return scores.adascale(model, *batch.outputs, shift, state, **options)


def _pro(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.pro(lambda images: model(images).logits, images_of(batch), **options)


def _approximate_mass(state: None, model: Model, batch: Batch) -> jax.Array:
    return scores.approximate_mass(lambda images: model(images).logits, images_of(batch))
