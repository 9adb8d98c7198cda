"""How likely the labels are at any temperature of the softmax, and at which they are most so."""

import math
from typing import NamedTuple

import numpy as np

from gradnorm_jax.statistics.moments import merge_sums
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead

TEMPERATURES = 2.0 ** np.linspace(6, -6, 49)
"""Where the likelihood is kept: from 64 to 1/64."""


class Likelihood(NamedTuple):
    """Sums of the negative log-likelihood's first two derivatives by log(1/T), at `TEMPERATURES`.

    Attributes:
        num_images: `[]`, how many there are.
        slope: `[49]`.
        curvature: `[49]`.
    """

    num_images: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray


def likelihood(logits: np.ndarray, labels: np.ndarray) -> Likelihood:
    """The sums of logits `[N, C]` and labels `[N]`, in float64.

    Raises:
        ValueError: a label is outside of the classes.
    """
    logits = np.asarray(logits, np.float64)
    outside = labels[(labels < 0) | (labels >= logits.shape[1])]
    if outside.size:
        raise ValueError(
            f"{outside.size} training images have labels outside of 0..{logits.shape[1] - 1} (such "
            f"as {outside[0]}, -1 meaning none); a temperature is fitted to images labelled with "
            "the network's classes"
        )
    shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
    labelled = np.take_along_axis(shifted, labels[:, None].astype(np.int64), axis=1)[:, 0]
    slope, curvature = np.zeros(len(TEMPERATURES)), np.zeros(len(TEMPERATURES))
    for i, beta in enumerate(1 / TEMPERATURES):
        weights = np.exp(beta * shifted)
        total = weights.sum(axis=1)
        weighted = weights * shifted
        mean = weighted.sum(axis=1) / total
        variance = (weighted * shifted).sum(axis=1) / total - mean**2
        slope[i] = beta * (mean - labelled).sum()
        curvature[i] = slope[i] + beta**2 * variance.sum()
    return Likelihood(np.array(float(len(logits))), slope, curvature)


def best_temperature(likelihood: Likelihood) -> float:
    """The temperature of the largest likelihood, within [1/64, 64].

    Between two temperatures that are kept, the slope is the cubic that meets both slopes and
    curvatures there: right to about 1e-5 of T.

    Raises:
        ValueError: there are no images.
    """
    if not likelihood.num_images:
        raise ValueError("no labelled training images to fit a temperature to; give at least one")
    # The likelihood is unimodal in T: its slope changes its sign once.
    right = int(np.searchsorted(likelihood.slope > 0, True))
    if right in (0, len(TEMPERATURES)):
        return float(TEMPERATURES[min(right, len(TEMPERATURES) - 1)])
    ends = slice(right - 1, right + 1)
    (t0, t1), slopes = TEMPERATURES[ends], likelihood.slope[ends]
    step = math.log(t0 / t1)
    a, b = likelihood.curvature[ends] * step
    gap = slopes[1] - slopes[0]
    cubic = np.polynomial.Polynomial([slopes[0], a, 3 * gap - 2 * a - b, a + b - 2 * gap])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cubic(middle) > 0 else (middle, high)
    return float(t0 * math.exp(-step * low))


def _none(head: LinearHead) -> Likelihood:
    return likelihood(np.zeros((0, head.kernel.shape[1])), np.zeros(0, np.int32))


def _update(value: Likelihood, examples: Examples) -> Likelihood:
    return merge_sums(value, likelihood(examples.logits, examples.labels))


LIKELIHOOD = Statistic("likelihood by temperature", _none, _update, merge_sums, needs_labels=True)
"""Of the labels."""
