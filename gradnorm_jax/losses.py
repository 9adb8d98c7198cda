"""Losses whose gradients are the detectors' signal, as pure functions of logits.

All are in nats and work per example, `[..., C] -> [...]`. Inputs narrower than float32 are widened
to it first, so that bfloat16 logits are accumulated in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.numerics import check_temperature, to_float32_at_least


def kl_to_uniform(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    r"""Kullback-Leibler divergence from the softmax to the uniform distribution.

    .. math:: KL(u \| p) = -\frac{1}{C} \sum_c \log p_c - \log C, \quad p = softmax(logits / T)

    Its gradient with respect to the logits is (p - 1/C) / T, computed without cancellation: for
    nearly equal logits as for logits 1e4 apart, in float32 and for any number of classes.

    Args:
        logits: `[..., C]`.
        temperature: T > 0.

    Returns:
        `[...]` in nats, >= 0, zero if and only if p is uniform.

    Raises:
        ValueError: the temperature is not positive and finite.

    References:
        Huang, Geng, Li (2021), "On the Importance of Gradients for Detecting Distributional Shifts
        in the Wild", equation 4. https://arxiv.org/abs/2110.00218
    """
    return _kl_to_uniform(_scale(logits, temperature))


def cross_entropy(logits: jax.Array, target: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    r"""Cross entropy between a given distribution and the softmax.

    .. math:: H(q, p) = -\sum_c q_c \log p_c, \quad p = softmax(logits / T)

    Its gradient with respect to the logits is (p - q) / T, without the cancellation that would
    lose it where p is nearly one-hot; see `softmax_minus_target`.

    Args:
        logits: `[..., C]`.
        target: `[..., C]`, the distribution q; it takes no gradient.
        temperature: T > 0.

    Returns:
        `[...]` in nats, at least the entropy of `target`.

    Raises:
        ValueError: the temperature is not positive and finite.
    """
    return _cross_entropy(*_prepare(logits, target, temperature))


def softmax_minus_uniform(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """The difference p - 1/C, p = softmax(logits / T), each entry to full relative precision.

    Subtracting 1/C from a softmax that is nearly uniform would leave only rounding errors; this
    takes the difference between the logarithms instead.

    Args:
        logits: `[..., C]`.
        temperature: T > 0.

    Returns:
        `[..., C]`, entries in [-1/C, 1 - 1/C], summing to zero.

    Raises:
        ValueError: the temperature is not positive and finite.
    """
    scaled = _scale(logits, temperature)
    return jnp.expm1(_log_ratio(scaled)) / scaled.shape[-1]


def softmax_minus_target(
    logits: jax.Array, target: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """The difference p - q between p = softmax(logits / T) and a given distribution q.

    A confident p is 1 up to rounding in its largest entry, and 1 - q_c would be left of the
    difference there; this takes what p lacks of 1 from the other entries. Where p is nearly uniform
    the difference is taken from there, as in `softmax_minus_uniform`.

    Args:
        logits: `[..., C]`.
        target: `[..., C]`, the distribution q; it takes no gradient.
        temperature: T > 0.

    Returns:
        `[..., C]`, entries in [-1, 1], summing to zero.

    Raises:
        ValueError: the temperature is not positive and finite.
    """
    return _minus_target(*_prepare(logits, target, temperature))


def _scale(logits: jax.Array, temperature: float) -> jax.Array:
    # The largest goes to zero before the division, so that no exponential overflows.
    check_temperature(temperature)
    logits = to_float32_at_least(logits)
    return (logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))) / temperature


def _log_ratio(scaled: jax.Array) -> jax.Array:
    """log(p / u) = log p_c + log C for logits whose maximum is zero."""
    centred = scaled - scaled.mean(axis=-1, keepdims=True)
    near = jnp.abs(centred).max(axis=-1, keepdims=True) < 1.0
    centred = jnp.where(near, centred, jnp.zeros_like(centred))
    # Exact where all logits are close: log1p and expm1 keep what 1 + x would round away.
    close = centred - jnp.log1p(jnp.expm1(centred).mean(axis=-1, keepdims=True))
    # Exact where they are far apart: a mean of huge logits would round away their differences.
    apart = jax.nn.log_softmax(scaled) + math.log(scaled.shape[-1])
    return jnp.where(near, close, apart)


@jax.custom_jvp
def _kl_to_uniform(scaled: jax.Array) -> jax.Array:
    return jnp.maximum(-_log_ratio(scaled).mean(axis=-1), 0.0)


@_kl_to_uniform.defjvp
def _kl_to_uniform_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The derivative is p - u. Derived step by step it would be a softmax minus a mean, and cancel.
    ratio = _log_ratio(*primals)
    value = jnp.maximum(-ratio.mean(axis=-1), 0.0)
    return value, (jnp.expm1(ratio) * tangents[0]).mean(axis=-1)


def _prepare(
    logits: jax.Array, target: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits with a maximum of zero, what their rounding has lost, and the target, in one type."""
    dtype = jnp.promote_types(*(to_float32_at_least(x).dtype for x in (logits, target)))
    logits, target = logits.astype(dtype), jax.lax.stop_gradient(target).astype(dtype)
    scaled = _scale(logits, temperature)
    lost = _lost_by_difference(logits, logits.max(axis=-1, keepdims=True)) / temperature
    return scaled, jax.lax.stop_gradient(lost), target


def _lost_by_difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """What rounds away in a - b, exactly: Knuth's two-sum."""
    difference = a - b
    minus_b = difference - a
    lost = (a - (difference - minus_b)) - (b + minus_b)
    return jnp.where(jnp.isfinite(lost), lost, jnp.zeros_like(lost))


def _minus_target(scaled: jax.Array, lost: jax.Array, target: jax.Array) -> jax.Array:
    """The difference p - target for logits whose maximum is zero."""
    num_classes = scaled.shape[-1]
    # A difference of 30 is rounded by up to 1e-6, by which its exponential would be off.
    weights = jnp.exp(scaled) * (1 + lost)
    is_largest = jax.nn.one_hot(scaled.argmax(axis=-1), num_classes, dtype=bool)
    others = jnp.where(is_largest, jnp.zeros_like(weights), weights).sum(axis=-1, keepdims=True)
    # Added to the largest one by one, many small weights would be rounded away.
    total = others + jnp.where(is_largest, weights, jnp.zeros_like(weights)).sum(-1, keepdims=True)
    p = weights / total
    apart = jnp.where(is_largest & (p > 0.5), (1 - target) - others / total, p - target)
    uniform = np.asarray(1 / num_classes, scaled.dtype)
    rest = 1 / num_classes - float(uniform)
    close = jnp.expm1(_log_ratio(scaled)) / num_classes + ((uniform - target) + rest)
    near = jnp.abs(scaled).max(axis=-1, keepdims=True) < 1.0
    return jnp.where(near, close, apart)


@jax.custom_jvp
def _cross_entropy(scaled: jax.Array, lost: jax.Array, target: jax.Array) -> jax.Array:
    return -(target * jax.nn.log_softmax(scaled)).sum(axis=-1)


@_cross_entropy.defjvp
def _cross_entropy_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    scaled, _, target = primals
    # The derivative is sum(q) p - q; a q that does not quite sum to one is no reason to differ.
    excess = target.sum(axis=-1, keepdims=True) - 1
    residual = _minus_target(*primals) + excess * jax.nn.softmax(scaled)
    return _cross_entropy(*primals), (residual * tangents[0]).sum(axis=-1)
