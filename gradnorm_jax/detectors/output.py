"""Detectors of the output space: MSP, ODIN, energy."""

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.numerics import check_step, check_temperature
from gradnorm_jax.types import Model


@builder
def msp(*, temperature: float = 1.0) -> Detector:
    """Maximum softmax probability; see `scores.msp`.

    Args:
        temperature: T > 0 of the softmax.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    return Detector("msp", "logits", _msp, options={"temperature": temperature})


@builder
def odin(*, temperature: float = 1000.0, epsilon: float = 0.0) -> Detector:
    """ODIN; see `scores.odin`. Without a step it needs only the logits.

    Args:
        temperature: T > 0 of the softmax.
        epsilon: size of the step, at least zero, in the units of the network's input.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    check_step(epsilon)
    if not epsilon:
        return Detector("odin", "logits", _msp, options={"temperature": temperature})
    options = {"temperature": temperature, "epsilon": epsilon}
    return Detector("odin", "network", _odin, options=options)


@builder
def energy(*, temperature: float = 1.0) -> Detector:
    """Negative free energy; see `scores.energy`.

    Args:
        temperature: T > 0 of the softmax.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    return Detector("energy", "logits", _energy, options={"temperature": temperature})


def _msp(state: None, model: Model, batch: Batch, *, temperature: float) -> jax.Array:
    return scores.msp(batch.outputs.logits, temperature=temperature)


def _energy(state: None, model: Model, batch: Batch, *, temperature: float) -> jax.Array:
    return scores.energy(batch.outputs.logits, temperature=temperature)


def _odin(
    state: None, model: Model, batch: Batch, *, temperature: float, epsilon: float
) -> jax.Array:
    assert batch.images is not None
    return scores.odin(
        lambda images: model(images).logits,
        batch.images,
        temperature=temperature,
        epsilon=epsilon,
    )
