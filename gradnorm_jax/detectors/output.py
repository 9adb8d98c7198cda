"""Detectors of the output space: functions of the logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, images_of
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.numerics import (
    check_count,
    check_step,
    check_temperature,
    to_common_float,
)
from gradnorm_jax.scores.output import check_gamma
from gradnorm_jax.statistics.likelihood import LIKELIHOOD, Likelihood, best_temperature
from gradnorm_jax.statistics.softmax_sums import SOFTMAX_SUMS, SoftmaxSums, log_templates
from gradnorm_jax.types import LinearHead, Model


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
def odin(
    *,
    temperature: float = 1000.0,
    epsilon: float = 0.0,
    input_std: float | Sequence[float] = 1.0,
) -> Detector:
    """ODIN; see `scores.odin`. Without a step it needs only the logits.

    Args:
        temperature: T > 0 of the softmax.
        epsilon: size of the step, at least zero, in the units of the network's input times
            `input_std`.
        input_std: what images are divided by, one number or one for each channel, if epsilon is in
            units of pixels from 0 to 1, as the authors' is.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    check_step(epsilon)
    if not epsilon:
        return Detector("odin", "logits", _msp, options={"temperature": temperature})
    if not (np.asarray(input_std) > 0).all():
        raise ValueError(f"input_std must be positive, got {input_std!r}")
    options = {"temperature": temperature, "epsilon": epsilon, "input_std": input_std}
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


@builder
def max_logit() -> Detector:
    """The largest logit; see `scores.max_logit`."""
    return Detector("max_logit", "logits", _max_logit)


@builder
def entropy(*, temperature: float = 1.0) -> Detector:
    """Negative entropy of the softmax; see `scores.entropy`.

    Args:
        temperature: T > 0 of the softmax.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    return Detector("entropy", "logits", _entropy, options={"temperature": temperature})


@builder
def temperature_scaling() -> Detector:
    """MSP at the temperature at which the training labels are most likely, within [1/64, 64].

    Fitted to labelled images that the network was not trained on, as in the paper: on those that it
    was, it is more certain than it should be elsewhere.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), "On Calibration of Modern Neural Networks", section
        4.2. https://arxiv.org/abs/1706.04599
    """
    return Detector("temperature_scaling", "logits", _at_temperature, _BEST_TEMPERATURE)


@builder
def gen(*, gamma: float = 0.1, top: int = 100) -> Detector:
    """Generalised entropy; see `scores.gen`.

    Args:
        gamma: the power, in (0, 1]; the paper's.
        top: how many of the largest probabilities count; the paper's for ImageNet, and all of
            CIFAR's.

    Raises:
        ValueError: an option is out of range.
    """
    check_gamma(gamma)
    check_count("top", top)
    return Detector("gen", "logits", _gen, options={"gamma": gamma, "top": top})


@builder
def kl_matching() -> Detector:
    """Divergence from the mean softmax of a predicted class; see `scores.kl_matching`.

    Labels are not used. OpenOOD takes a one-hot template for a class that is never predicted; here
    it has none. Where a template is zero, that code gives infinity; here, a large number.
    """
    return Detector("kl_matching", "logits", _kl_matching, _TEMPLATES)


def _temperature_state(head: LinearHead, found: Likelihood) -> jax.Array:
    return jnp.asarray(best_temperature(found))


def _templates_state(head: LinearHead, sums: SoftmaxSums) -> jax.Array:
    return jnp.asarray(log_templates(sums))


_BEST_TEMPERATURE = Fit((LIKELIHOOD,), _temperature_state)
_TEMPLATES = Fit((SOFTMAX_SUMS,), _templates_state)


def _max_logit(state: None, model: Model, batch: Batch) -> jax.Array:
    return scores.max_logit(batch.outputs.logits)


def _entropy(state: None, model: Model, batch: Batch, *, temperature: float) -> jax.Array:
    return scores.entropy(batch.outputs.logits, temperature=temperature)


def _at_temperature(state: jax.Array, model: Model, batch: Batch) -> jax.Array:
    (logits, temperature) = to_common_float(batch.outputs.logits, state)
    return scores.msp(logits / temperature)


def _gen(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.gen(batch.outputs.logits, **options)


def _kl_matching(state: jax.Array, model: Model, batch: Batch) -> jax.Array:
    return scores.kl_matching(batch.outputs.logits, state)


def _msp(state: None, model: Model, batch: Batch, *, temperature: float) -> jax.Array:
    return scores.msp(batch.outputs.logits, temperature=temperature)


def _energy(state: None, model: Model, batch: Batch, *, temperature: float) -> jax.Array:
    return scores.energy(batch.outputs.logits, temperature=temperature)


def _odin(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.odin(lambda images: model(images).logits, images_of(batch), **options)
