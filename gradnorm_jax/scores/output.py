"""Scores of the network's output: higher means more in-distribution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import (
    as_rows,
    check_count,
    check_step,
    check_temperature,
    to_common_float,
)


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


def max_logit(logits: ArrayLike) -> jax.Array:
    """The largest logit.

    Args:
        logits: `[B, C]`.

    Returns:
        `[B]` in the units of the logits; higher is more in-distribution.

    References:
        Hendrycks et al. (2022), "Scaling Out-of-Distribution Detection for Real-World Settings".
        https://arxiv.org/abs/1911.11132
    """
    return as_rows("logits", logits, "C").max(axis=-1)


def entropy(logits: ArrayLike, *, temperature: float = 1.0) -> jax.Array:
    """Negative entropy of the softmax, sum_c p_c log p_c.

    Args:
        logits: `[B, C]`.
        temperature: T > 0.

    Returns:
        `[B]` in nats, in [-log C, 0]; higher is more in-distribution.

    Raises:
        ValueError: the temperature is not positive and finite, or the logits are not `[B, C]`.

    References:
        Hendrycks, Gimpel (2017), section 2. https://arxiv.org/abs/1610.02136
    """
    check_temperature(temperature)
    log_p, _ = _log_probabilities(as_rows("logits", logits, "C") / temperature)
    return (jnp.exp(log_p) * log_p).sum(axis=-1)


def gen(logits: ArrayLike, *, gamma: float = 0.1, top: int = 100) -> jax.Array:
    r"""Generalised entropy of the largest probabilities.

    .. math:: S = -\sum_{c \in top M} p_c^\gamma (1 - p_c)^\gamma

    What a confident p lacks of 1 is taken from the other logits: 1 - p would be zero in float32, of
    which a small power makes a large error. Public code computes that difference (XixiLiu95/GEN) or
    bounds p by 1e-7 and averages (pytorch-ood), and so ranks confident images otherwise.

    Args:
        logits: `[B, C]`.
        gamma: the power, in (0, 1].
        top: M, how many of the largest probabilities count; all where there are fewer.

    Returns:
        `[B]`, at most zero; higher is more in-distribution.

    Raises:
        ValueError: gamma or top is out of range, or the logits are not `[B, C]`.

    References:
        Liu, Lochman, Zach (2023), "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution
        Detection".
    """
    check_gamma(gamma)
    check_count("top", top)
    log_p, log_rest = _log_probabilities(as_rows("logits", logits, "C"))
    _, largest = jax.lax.top_k(log_p, min(top, log_p.shape[-1]))
    log_product = jnp.take_along_axis(log_p + log_rest, largest, axis=-1)
    return -jnp.exp(gamma * log_product).sum(axis=-1)


def check_gamma(gamma: float) -> None:
    """Raises ValueError unless gamma is in (0, 1]."""
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma!r}")


def kl_matching(logits: ArrayLike, log_templates: ArrayLike) -> jax.Array:
    """Negative divergence from the nearest template, -min_k KL(p || d_k).

    Args:
        logits: `[B, C]`.
        log_templates: `[K, C]`, logarithms of the distributions d_k, all finite: the mean softmax
            of the training images that are predicted as each class; see
            `statistics.softmax_sums.log_templates`.

    Returns:
        `[B]` in nats, at most zero; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above.

    References:
        Hendrycks et al. (2022), section 3. https://arxiv.org/abs/1911.11132
    """
    logits, log_templates = to_common_float(
        as_rows("logits", logits, "C"), as_rows("log_templates", log_templates, "C")
    )
    if logits.shape[1] != log_templates.shape[1]:
        raise ValueError(
            f"logits have {logits.shape[1]} classes, but the templates {log_templates.shape[1]}: "
            "fit them to the same network"
        )
    log_p, _ = _log_probabilities(logits)
    p = jnp.exp(log_p)
    cross = jnp.matmul(p, log_templates.T, precision=jax.lax.Precision.HIGHEST)
    return -jnp.maximum((p * log_p).sum(axis=-1) - cross.max(axis=-1), 0.0)


def _log_probabilities(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log p and log(1 - p) `[B, C]`, accurate where p is nearly one, too."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    is_largest = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=bool)
    others = jnp.where(is_largest, jnp.full_like(shifted, -jnp.inf), shifted)
    log_others = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    log_total = jnp.log1p(jnp.exp(log_others))
    log_p = shifted - log_total
    # The largest is kept away from the branch that is not its own, where it would give -inf.
    at_most_half = jnp.where(is_largest, jnp.full_like(log_p, -1.0), log_p)
    return log_p, jnp.where(is_largest, log_others - log_total, jnp.log1p(-jnp.exp(at_most_half)))


def odin(
    logits_of: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    temperature: float = 1000.0,
    epsilon: float = 0.0,
    input_std: ArrayLike = 1.0,
) -> jax.Array:
    """Maximum softmax probability at a high temperature, after a step that raises it.

    The image moves by epsilon against the sign of the gradient of the cross entropy with its own
    predicted class, x - epsilon sign(d/dx [-log max_c softmax(logits(x) / T)_c]), where sign(0) is
    +1, and the score is `msp` of the moved image. A step costs about two forward passes, and the
    score of the moved image one, beside the shared one.

    Args:
        logits_of: pure function from images `[B, ...]` to logits `[B, C]`, each by itself.
        images: `[B, ...]`, as the network takes them.
        temperature: T > 0.
        epsilon: size of the step, >= 0, in the units of `images` times `input_std`; zero takes
            none.
        input_std: what images were divided by, as their last axis has it: the step is divided by it
            too, and so is one of epsilon in units of pixels from 0 to 1.

    Returns:
        `[B]`, probabilities in [1/C, 1].

    Raises:
        ValueError: the temperature or epsilon is out of range, `input_std` does not go with the
            last axis, the logits are not `[B, C]` with a
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
        step = jnp.where(gradient >= 0, -epsilon, epsilon).astype(images.dtype)
        images = images + step / jnp.broadcast_to(jnp.asarray(input_std, step.dtype), step.shape)
    return msp(logits(images), temperature=temperature)
