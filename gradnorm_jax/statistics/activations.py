"""How activations are distributed, from one pass that needs not know their range.

A float32 number is counted by its leading 20 bits: sign, exponent and 11 bits of its mantissa. The
middle of its bucket is therefore within 2^-12 of it, relatively, however large or small it is.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gradnorm_jax.statistics.moments import merge_sums
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead

_SIGN = np.uint32(1 << 31)
_DROPPED = 12
_BUCKETS = 1 << (32 - _DROPPED)


class Histogram(NamedTuple):
    """Counts of activations of all features together.

    Attributes:
        counts: `[2^20]` int64, by bucket, of ascending activations.
    """

    counts: np.ndarray


class Contributions(NamedTuple):
    """What activations add to the logit of the predicted class, by how large they are.

    Attributes:
        kernel: `[D, C]`, the last layer's.
        sums: `[2^20]`, sum of w_i h_i over activations h_i by bucket, w the weights of the
            predicted class.
    """

    kernel: np.ndarray
    sums: np.ndarray


class Shaping(NamedTuple):
    """The factors of `scores.optfs`.

    Attributes:
        theta: `[bins]`.
        left: where the first bin begins.
        right: where the last ends.
    """

    theta: np.ndarray
    left: np.ndarray
    right: np.ndarray


def buckets(values: ArrayLike) -> np.ndarray:
    """The bucket of each number, in 0 .. 2^20 - 1; larger numbers are in later ones."""
    # Adding zero turns -0 into 0.
    bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.uint32)
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (ordered >> _DROPPED).astype(np.int64)


def bucket_values() -> np.ndarray:
    """The middle of each bucket, `[2^20]`; zero for that which zero is in."""
    ordered = (np.arange(_BUCKETS, dtype=np.uint32) << _DROPPED) + (1 << (_DROPPED - 1))
    bits = np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered)
    with np.errstate(invalid="ignore"):  # the last buckets are of NaN
        values = bits.view(np.float32).astype(np.float64)
    values[buckets(0.0)] = 0.0
    return values


def quantile(histogram: Histogram, q: float) -> float:
    """The q-quantile, as `numpy.quantile` interpolates it, within 2^-12 of it relatively.

    Raises:
        ValueError: q is not in [0, 1], or nothing has been counted.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in [0, 1], got {q}")
    ends = np.cumsum(histogram.counts)
    if not ends[-1]:
        raise ValueError("no training images to fit to; give at least one")
    rank = q * (ends[-1] - 1)
    values = bucket_values()
    below, above = (
        values[np.searchsorted(ends, i, side="right")] for i in (np.floor(rank), np.ceil(rank))
    )
    return float(below + (above - below) * (rank % 1))


def optimal_shaping(
    histogram: Histogram, contributions: Contributions, bins: int, tail: float
) -> Shaping:
    """Factors of equal bins between two quantiles: what activations in each contribute.

    Args:
        histogram: of the activations.
        contributions: to the logits of the predicted classes.
        bins: how many.
        tail: below the quantile `tail` and above 1 - `tail`, nothing is kept.

    Raises:
        ValueError: nothing has been counted, or nothing is contributed.
    """
    left, right = quantile(histogram, tail), quantile(histogram, 1 - tail)
    values = bucket_values()
    inside = (values >= left) & (values < right)
    index = np.floor((values[inside] - left) / (right - left) * bins).astype(np.int64)
    theta = np.bincount(index, contributions.sums[inside], bins)
    length = np.linalg.norm(theta)
    if not length:
        raise ValueError("the features of the training images do not vary; give other images")
    return Shaping(1000 * theta / length, np.array(left), np.array(right))


def _no_activations(head: LinearHead) -> Histogram:
    return Histogram(np.zeros(_BUCKETS, np.int64))


def _count(value: Histogram, examples: Examples) -> Histogram:
    index = buckets(examples.features).reshape(-1)
    return Histogram(value.counts + np.bincount(index, minlength=_BUCKETS))


def _no_contributions(head: LinearHead) -> Contributions:
    return Contributions(np.asarray(head.kernel, np.float64), np.zeros(_BUCKETS))


def _contribute(value: Contributions, examples: Examples) -> Contributions:
    weights = value.kernel.T[examples.logits.argmax(axis=1)]
    products = weights * examples.features
    index = buckets(examples.features).reshape(-1)
    sums = value.sums + np.bincount(index, products.reshape(-1), _BUCKETS)
    return value._replace(sums=sums)


def _add_contributions(left: Contributions, right: Contributions) -> Contributions:
    return left._replace(sums=left.sums + right.sums)


ACTIVATIONS = Statistic("activations", _no_activations, _count, merge_sums)
"""Of all features together."""
CONTRIBUTIONS = Statistic("contributions", _no_contributions, _contribute, _add_contributions)
"""To the logit of the predicted class."""
