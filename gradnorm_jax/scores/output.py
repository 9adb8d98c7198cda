"""Scores of the network's output: higher means more in-distribution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, check_step, check_temperature


def msp(logits: ArrayLike, *, temperature: float = 1.0) -> jax.Array:
    """Maximum softmax probability, max_c softmax(logits / T)_c.

    Args:
        logits: `[B, C]`.
        temperature: T > 0.

    Returns:
        `[B]`, probabilities in [1/C, 1].

    Raises:
        ValueError: the temperature is not positive and finite, or the logits are not `[B, C]`.

    References:
        Hendrycks, Gimpel (2017), "A Baseline for Detecting Misclassified and Out-of-Distribution
        Examples in Neural Networks". https://arxiv.org/abs/1610.02136
    """
    check_temperature(temperature)
    return jax.nn.softmax(as_rows("logits", logits, "C") / temperature, axis=-1).max(axis=-1)


def energy(logits: ArrayLike, *, temperature: float = 1.0) -> jax.Array:
    """Negative free energy, T log sum_c exp(logits_c / T).

    Args:
        logits: `[B, C]`.
        temperature: T > 0.

    Returns:
        `[B]` in the units of the logits, at least max_c logits_c.

    Raises:
        ValueError: the temperature is not positive and finite, or the logits are not `[B, C]`.

    References:
        Liu, Wang, Owens, Li (2020), "Energy-based Out-of-distribution Detection", equation 4
        (its negative). https://arxiv.org/abs/2010.03759
    """
    check_temperature(temperature)
    return temperature * jax.nn.logsumexp(as_rows("logits", logits, "C") / temperature, axis=-1)


def odin(
    logits_of: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    temperature: float = 1000.0,
    epsilon: float = 0.0,
) -> jax.Array:
    """Maximum softmax probability at a high temperature, after a step that raises it.

    The image moves by epsilon against the sign of the gradient of the cross entropy with its own
    predicted class, x - epsilon sign(d/dx [-log max_c softmax(logits(x) / T)_c]), where sign(0) is
    +1, and the score is `msp` of the moved image.

    Args:
        logits_of: pure function from images `[B, ...]` to logits `[B, C]`, each by itself.
        images: `[B, ...]`, as the network takes them.
        temperature: T > 0.
        epsilon: size of the step, >= 0, in the units of `images`; zero takes none.

    Returns:
        `[B]`, probabilities in [1/C, 1].

    Raises:
        ValueError: the temperature or epsilon is out of range, the logits are not `[B, C]` with a
            row for each image, or the images are integers, by which nothing can be differentiated.

    References:
        Liang, Li, Srikant (2018), "Enhancing The Reliability of Out-of-distribution Image Detection
        in Neural Networks", equations 1 and 2. https://arxiv.org/abs/1706.02690
    """
    check_temperature(temperature)
    check_step(epsilon)
    images = jnp.asarray(images)

    def logits(images: jax.Array) -> jax.Array:
        values = as_rows("what logits_of returns", logits_of(images), "C")
        if len(values) != len(images):
            raise ValueError(
                "logits_of must return a row [C] for each image, got shape "
                f"{values.shape} for images {images.shape}"
            )
        return values

    def cross_entropy_of_prediction(images: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(images) / temperature)
        # Examples do not interact, so the gradient of the sum holds each example's own.
        return -log_p.max(axis=-1).sum()

    if isinstance(epsilon, jax.core.Tracer) or epsilon:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images must be floats to take a step, as the network takes them, got "
                f"{images.dtype}"
            )
        gradient = jax.grad(cross_entropy_of_prediction)(images)
        images = images + jnp.where(gradient >= 0, -epsilon, epsilon).astype(images.dtype)
    return msp(logits(images), temperature=temperature)
