"""Rectifiers that are known by name: ReAct, DICE, ASH, SCALE, VRA, OptFS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.rectifier import Rectifier
from gradnorm_jax.numerics import check_count, check_fraction
from gradnorm_jax.statistics.activations import (
    ACTIVATIONS,
    CONTRIBUTIONS,
    Contributions,
    Histogram,
    Shaping,
    optimal_shaping,
    quantile,
)
from gradnorm_jax.statistics.class_moments import PREDICTED_CLASS_SUMS, ClassSums
from gradnorm_jax.types import LinearHead, Outputs


@builder
def react(*, quantile: float = 0.9, threshold: float | None = None) -> Rectifier:
    """Features cut off at a quantile of all training features; see `scores.react`.

    Args:
        quantile: which; the paper's.
        threshold: where to cut instead, without a fit.

    Raises:
        ValueError: an option is out of range.
    """
    check_fraction("quantile", quantile)
    if threshold is not None:
        return Rectifier("react", _react_at, options={"threshold": threshold})
    return Rectifier("react", _react, _quantiles_fit((quantile,)))


@builder
def vra(
    *,
    lower_quantile: float = 0.6,
    upper_quantile: float = 0.95,
    lower: float | None = None,
    upper: float | None = None,
    gamma: float = 0.0,
) -> Rectifier:
    """Small features become zero and large ones are cut off; see `scores.vra`.

    Args:
        lower_quantile: of all training features, below which they become zero; the paper's for
            CIFAR.
        upper_quantile: of all training features, at which they are cut off; the paper's for CIFAR.
        lower: where that is instead, without a fit; together with `upper`. The authors' code has
            0.5 and 1 for a ResNet-50 on ImageNet, and 1 and 2 for BiT.
        upper: see `lower`.
        gamma: what is added between the two; VRA+ if positive.

    Raises:
        ValueError: an option is out of range, or only one of `lower` and `upper` is given.
    """
    check_fraction("lower_quantile", lower_quantile)
    check_fraction("upper_quantile", upper_quantile)
    if (lower is None) != (upper is None):
        raise ValueError("lower and upper are thresholds that go together: give both or neither")
    if lower is None or upper is None:
        _check_bounds(lower_quantile, upper_quantile)
        fit = _quantiles_fit((lower_quantile, upper_quantile))
        return Rectifier("vra", _vra, fit, {"gamma": gamma})
    _check_bounds(lower, upper)
    return Rectifier("vra", _vra_at, options={"lower": lower, "upper": upper, "gamma": gamma})


def _check_bounds(lower: float, upper: float) -> None:
    if not lower <= upper:
        raise ValueError(f"the lower bound must not exceed the upper, got {lower} and {upper}")


@builder
def ash_p(*, sparsity: float = 0.6) -> Rectifier:
    """All but the largest features of an image become zero; see `scores.ash_p`.

    Args:
        sparsity: the fraction that does; the paper's for a ResNet-50 on ImageNet, and 0.9 for
            CIFAR-10.

    Raises:
        ValueError: an option is out of range.
    """
    return _per_image("ash_p", sparsity)


@builder
def ash_b(*, sparsity: float = 0.65) -> Rectifier:
    """The largest features of an image become equal, the others zero; see `scores.ash_b`.

    Args:
        sparsity: the fraction of the others; the paper's for a ResNet-50 on ImageNet, and 0.95 for
            CIFAR-10.

    Raises:
        ValueError: an option is out of range.
    """
    return _per_image("ash_b", sparsity)


@builder
def ash_s(*, sparsity: float = 0.9) -> Rectifier:
    """The largest features of an image grow, the others become zero; see `scores.ash_s`.

    Args:
        sparsity: the fraction of the others; the paper's for a ResNet-50 on ImageNet, and 0.95 for
            CIFAR-10.

    Raises:
        ValueError: an option is out of range.
    """
    return _per_image("ash_s", sparsity)


@builder
def scale(*, sparsity: float = 0.85) -> Rectifier:
    """Features grow the more, the less of them the largest make up; see `scores.scale`.

    Args:
        sparsity: the fraction that is not of the largest; the paper's.

    Raises:
        ValueError: an option is out of range.
    """
    return _per_image("scale", sparsity)


@builder
def dice(*, sparsity: float = 0.7) -> Rectifier:
    """The last layer without the weights that contribute least to the logits of training images.

    A weight's contribution is its product with the mean of its feature.

    Args:
        sparsity: the fraction of weights that become zero; the paper's for ImageNet, and 0.9 for
            CIFAR.

    Raises:
        ValueError: an option is out of range.

    References:
        Sun, Li (2022), "DICE: Leveraging Sparsification for Out-of-Distribution Detection".
        https://arxiv.org/abs/2111.09805
    """
    check_fraction("sparsity", sparsity)
    return Rectifier("dice", _dice, _sparse_kernel_fit(sparsity), changes_head=True)


@builder
def optfs(*, bins: int = 100, tail: float = 0.001) -> Rectifier:
    """Features weighed by what such features contribute in training; see `scores.optfs`.

    Args:
        bins: how many factors there are; the paper's.
        tail: the fraction of features at either end that become zero; that of the authors' code.

    Raises:
        ValueError: an option is out of range.
    """
    check_count("bins", bins)
    if not 0 <= tail < 0.5:
        raise ValueError(f"tail is a fraction below 0.5, got {tail}")
    return Rectifier("optfs", _optfs, _shaping_fit(bins, tail))


_PER_IMAGE = {
    "ash_p": scores.ash_p,
    "ash_b": scores.ash_b,
    "ash_s": scores.ash_s,
    "scale": scores.scale,
}


def _per_image(name: str, sparsity: float) -> Rectifier:
    check_fraction("sparsity", sparsity)
    return Rectifier(name, _rectify_per_image, options={"method": name, "sparsity": sparsity})


@functools.cache
def _quantiles_fit(levels: tuple[float, ...]) -> Fit:
    def finalize(head: LinearHead, histogram: Histogram) -> jax.Array:
        return jnp.asarray([quantile(histogram, level) for level in levels])

    return Fit((ACTIVATIONS,), finalize)


@functools.cache
def _sparse_kernel_fit(sparsity: float) -> Fit:
    def finalize(head: LinearHead, sums: ClassSums) -> jax.Array:
        mean = sums.sums.sum(axis=0) / max(sums.counts.sum(), 1)
        contributions = mean[:, None] * head.kernel
        kept = contributions > np.quantile(contributions, sparsity)
        return jnp.asarray(np.where(kept, head.kernel, 0.0))

    return Fit((PREDICTED_CLASS_SUMS,), finalize)


@functools.cache
def _shaping_fit(bins: int, tail: float) -> Fit:
    def finalize(head: LinearHead, histogram: Histogram, contributions: Contributions) -> Shaping:
        shaping = optimal_shaping(histogram, contributions, bins, tail)
        return jax.tree.map(jnp.asarray, shaping)

    return Fit((ACTIVATIONS, CONTRIBUTIONS), finalize)


def _react(state: jax.Array, head: LinearHead, outputs: Outputs) -> Outputs:
    return scores.outputs_of(scores.react(outputs.features, state[0]), *head)


def _react_at(state: None, head: LinearHead, outputs: Outputs, *, threshold: float) -> Outputs:
    return scores.outputs_of(scores.react(outputs.features, threshold), *head)


def _vra(state: jax.Array, head: LinearHead, outputs: Outputs, *, gamma: float) -> Outputs:
    rows = scores.vra(outputs.features, state[0], state[1], gamma=gamma)
    return scores.outputs_of(rows, *head)


def _vra_at(
    state: None, head: LinearHead, outputs: Outputs, *, lower: float, upper: float, gamma: float
) -> Outputs:
    rows = scores.vra(outputs.features, lower, upper, gamma=gamma)
    return scores.outputs_of(rows, *head)


def _rectify_per_image(
    state: None, head: LinearHead, outputs: Outputs, *, method: str, sparsity: float
) -> Outputs:
    return scores.outputs_of(_PER_IMAGE[method](outputs.features, sparsity=sparsity), *head)


def _dice(state: jax.Array, head: LinearHead, outputs: Outputs) -> Outputs:
    return scores.outputs_of(outputs.features, state, head.bias)


def _optfs(state: Shaping, head: LinearHead, outputs: Outputs) -> Outputs:
    return scores.outputs_of(scores.optfs(outputs.features, *state), *head)
