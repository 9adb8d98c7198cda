"""Scores of inputs that are moved along their own gradient."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gradnorm_jax.numerics import (
    as_rows,
    check_count,
    check_fraction,
    check_step,
    divide_or_zero,
    to_common_float,
)
from gradnorm_jax.scores.output import energy, entropy, gen, msp
from gradnorm_jax.types import Model, linear_head

Base = Literal["msp", "entropy", "gen"]

_BASES: dict[str, Callable[..., jax.Array]] = {"msp": msp, "entropy": entropy, "gen": gen}


def input_gradient(
    score_of: Callable[[jax.Array], jax.Array], images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores `[B]`, and the gradient of each with respect to its own image `[B, ...]`."""

    def total(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = score_of(images)
        # Examples do not interact, so the gradient of the sum holds each example's own.
        return scores.sum(), scores

    gradient, scores = jax.grad(total, has_aux=True)(images)
    return scores, gradient


def approximate_mass(logits_of: Callable[[jax.Array], jax.Array], images: ArrayLike) -> jax.Array:
    r"""Negative length of the gradient of the log density that the logits stand for.

    .. math:: S = -\|\partial L / \partial x\|_2, \quad L = \log \sum_c e^{z_c}

    Costs about two forward passes beside the shared one.

    Args:
        logits_of: pure function from images `[B, ...]` to logits `[B, C]`, each by itself.
        images: `[B, ...]`, as the network takes them.

    Returns:
        `[B]`, at most zero; higher is more in-distribution.

    References:
        Grathwohl et al. (2020), "Your Classifier is Secretly an Energy Based Model and You Should
        Treat It Like One", section 5.3.2. https://arxiv.org/abs/1912.03263
    """
    _, gradient = input_gradient(lambda x: energy(logits_of(x)), jnp.asarray(images))
    return -jnp.linalg.norm(gradient.reshape(len(gradient), -1), axis=1)


def pro(
    logits_of: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    base: Base = "entropy",
    steps: int = 2,
    epsilon: float = 0.0014,
    temperature: float = 1.0,
) -> jax.Array:
    r"""The least score on the way down: PRO.

    .. math:: S = \min_{k = 0 .. K} s(x_k), \quad x_{k+1} = x_k - \epsilon \,
        sign(\partial s(x_k) / \partial x)

    Costs K times about two forward passes, and one more, beside the shared one.

    Args:
        logits_of: pure function from images `[B, ...]` to logits `[B, C]`, each by itself.
        images: `[B, ...]`, as the network takes them. They are not clipped.
        base: the score s. The paper's steps for "msp" are one of 0.003, for "entropy" two of
            0.0014, for "gen" three of 1e-4.
        steps: K, at least 1.
        epsilon: size of a step, in the units of `images`.
        temperature: of the softmax, for "msp" and "entropy".

    Returns:
        `[B]`, in the range of s; higher is more in-distribution.

    Raises:
        ValueError: an option is out of range.

    References:
        Chen et al. (2025), "Leveraging Perturbation Robustness to Enhance Out-of-Distribution
        Detection". https://arxiv.org/abs/2503.18784
    """
    check_count("steps", steps)
    check_step(epsilon)
    options = {} if base == "gen" else {"temperature": temperature}
    score = functools.partial(_BASES[base], **options)
    moved, found = jnp.asarray(images), []
    for _ in range(steps):
        scores, gradient = input_gradient(lambda x: score(logits_of(x)), moved)
        found.append(scores)
        moved = moved - (epsilon * jnp.sign(gradient)).astype(moved.dtype)
    return jnp.stack([*found, score(logits_of(moved))]).min(axis=0)


def adascale_shift(
    model: Model,
    images: ArrayLike,
    *,
    epsilon: float = 0.5,
    fraction: float = 0.05,
    k_shift: float = 0.01,
    k_activation: float = 0.05,
    weight: float = 10.0,
) -> jax.Array:
    r"""How far features move when the least sensitive pixels do: AdaSCALE's Q'.

    .. math:: Q' = \lambda \sum_{i \in top k_1(h)} |h_i - h'_i| + \sum_{i \in top k_2(h)}
        \max(h'_i, 0)

    where h' are the features of the image in which the given fraction of the numbers, those with
    the smallest absolute derivatives of the largest logit, have moved by epsilon times the sign of
    theirs.

    Args:
        model: the network.
        images: `[B, ...]`, as the network takes them.
        epsilon: size of the step; the paper's, for images divided by their deviation.
        fraction: of an image's numbers, rounded down, that move; of equal ones the first.
        k_shift: k_1, as a fraction of the features, rounded down but to one at least.
        k_activation: k_2, likewise.
        weight: lambda.

    Returns:
        `[B]`; higher is more out-of-distribution, though through the first term alone.

    Raises:
        ValueError: an option is out of range.

    References:
        Regmi (2025), "AdaSCALE: Adaptive Scaling for OOD Detection". The authors' code takes k_1
        for the second sum and k_2 for the first, when it is fitted otherwise than when it scores;
        OpenOOD's does so both times. https://arxiv.org/abs/2503.08023
    """
    check_step(epsilon)
    shares = {"fraction": fraction, "k_shift": k_shift, "k_activation": k_activation}
    for name, value in shares.items():
        check_fraction(name, value)
    images = jnp.asarray(images)

    def largest_logit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, logits = model(x)
        return as_rows("logits", logits, "C").max(axis=1).sum(), features

    gradient, features = jax.grad(largest_logit, has_aux=True)(images)
    flat = gradient.reshape(len(images), -1)
    _, least = jax.lax.top_k(-jnp.abs(flat), int(fraction * flat.shape[1]))
    rows = jnp.arange(len(flat))[:, None]
    step = jnp.zeros_like(flat).at[rows, least].set(jnp.take_along_axis(jnp.sign(flat), least, 1))
    moved = model(images + (epsilon * step.reshape(images.shape)).astype(images.dtype)).features
    before, after = (as_rows("features", x, "D") for x in (features, moved))

    def sum_of_top(values: jax.Array, share: float) -> jax.Array:
        _, top = jax.lax.top_k(before, max(1, int(share * before.shape[1])))
        return jnp.take_along_axis(values, top, axis=1).sum(axis=1)

    shift = sum_of_top(jnp.abs(before - after), k_shift)
    return weight * shift + sum_of_top(jax.nn.relu(after), k_activation)


def adascale(
    model: Model,
    features: ArrayLike,
    logits: ArrayLike,
    shift: ArrayLike,
    shifts: ArrayLike,
    *,
    variant: Literal["A", "L"] = "A",
    low: float = 60.0,
    high: float = 85.0,
) -> jax.Array:
    r"""Energy after a scaling that is the stronger, the less an image's features move: AdaSCALE.

    .. math:: p = p_{min} + (1 - F(Q')) (p_{max} - p_{min}), \quad r = \frac{\sum_i h_i}{\sum_{i \in
        top} h_i}

    with F the distribution of Q' among in-distribution images, h the rectified features, and the
    top those above their p-th percentile. S is the energy of W^T (h e^r) + b for "A", and that of
    z r^2 for "L".

    Args:
        model: the network, for its last layer.
        features: `[B, D]`.
        logits: `[B, C]`.
        shift: `[B]`, Q' of the images, from `adascale_shift`.
        shifts: `[N]`, those of in-distribution images, ascending.
        variant: scale activations or logits.
        low: the smallest percentile.
        high: the largest; the paper searches it on validation data, 80 or 85 for a ResNet-50.

    Returns:
        `[B]` in the units of the logits; higher is more in-distribution.

    Raises:
        ValueError: the percentiles are not 0 <= low <= high < 100.

    References:
        Regmi (2025), sections 3.2 and 3.3. https://arxiv.org/abs/2503.08023
    """
    if not 0 <= low <= high < 100:
        raise ValueError(f"percentiles must be 0 <= low <= high < 100, got {low} and {high}")
    h, z, kernel, bias, found, known = to_common_float(
        as_rows("features", features, "D"),
        as_rows("logits", logits, "C"),
        *linear_head(model),
        shift,
        shifts,
    )
    rectified = jax.nn.relu(h)
    below = jnp.searchsorted(known, found, side="right").astype(h.dtype) / len(known)
    percentile = low + (1 - below) * (high - low)
    size = h.shape[1]
    count = size - jnp.round(size * percentile / 100).astype(jnp.int32)
    sums = jnp.cumsum(jnp.sort(rectified, axis=1, descending=True), axis=1)
    top = jnp.take_along_axis(sums, count[:, None].clip(1) - 1, axis=1)
    ratio = divide_or_zero(sums[:, -1:], top)
    if variant == "L":
        return energy(z * ratio**2)
    scaled = rectified * jnp.exp(ratio)
    precise = jax.lax.Precision.HIGHEST
    return energy(jnp.matmul(scaled, kernel, precision=precise) + bias[None])
