"""Ranges of Gram matrices among training images, and deviations of those that are held out."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.gram import GramRanges
from gradnorm_jax.statistics.bank import hash_positions
from gradnorm_jax.statistics.moments import merge_sums
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class Extremes(NamedTuple):
    """Extremes of rows, by predicted class, or of all.

    Attributes:
        low: `[C or 1, K]`, infinite where there are no images.
        high: likewise.
    """

    low: np.ndarray
    high: np.ndarray


class RowSum(NamedTuple):
    """A sum of rows.

    Attributes:
        num_images: `[]`, how many.
        sum: `[L]`.
    """

    num_images: np.ndarray
    sum: np.ndarray


@functools.cache
def extremes(held_out: float, per_class: bool) -> Statistic:
    """Extremes of rows of all images but a fraction that is held out."""

    def init(head: LinearHead) -> Extremes:
        num_features, num_classes = head.kernel.shape
        low = np.full((num_classes if per_class else 1, num_features), np.inf, np.float32)
        return Extremes(low, -low)

    def update(value: Extremes, examples: Examples) -> Extremes:
        kept = ~is_held_out(examples.positions, held_out)
        rows, predicted = examples.features[kept], examples.logits[kept].argmax(axis=1)
        low, high = (x.astype(np.result_type(x, rows)) for x in value)
        for c in np.unique(predicted if per_class else np.zeros(min(len(rows), 1), np.int64)):
            own = rows[predicted == c] if per_class else rows
            low[c] = np.minimum(low[c], own.min(axis=0))
            high[c] = np.maximum(high[c], own.max(axis=0))
        return Extremes(low, high)

    kind = "by prediction" if per_class else "of all"
    return Statistic(f"extremes {kind}, {held_out} held out", init, update, _widen)


@functools.cache
def held_out_sum(held_out: float) -> Statistic:
    """The sum of rows of the images that `extremes` leaves out."""

    def init(head: LinearHead) -> RowSum:
        return RowSum(np.array(0.0), np.zeros(len(head.kernel)))

    def update(value: RowSum, examples: Examples) -> RowSum:
        rows = examples.features[is_held_out(examples.positions, held_out)]
        new = RowSum(np.array(float(len(rows))), rows.sum(axis=0, dtype=np.float64))
        return merge_sums(value, new)

    return Statistic(f"sum of {held_out} held out", init, update, merge_sums)


def is_held_out(positions: np.ndarray, fraction: float) -> np.ndarray:
    """Which images make up a random fraction, by their positions alone."""
    return hash_positions(positions) < fraction * 2.0**64


def gram_ranges(value: Extremes) -> GramRanges:
    """The ranges; those of all images for classes that no image is predicted to be of.

    Raises:
        ValueError: there are no images.
    """
    seen = np.isfinite(value.low).all(axis=1, keepdims=True)
    if not seen.any():
        raise ValueError("no training images to fit to that are not held out; give more")
    low = np.where(seen, value.low, value.low.min(axis=0, keepdims=True))
    high = np.where(seen, value.high, value.high.max(axis=0, keepdims=True))
    return GramRanges(jnp.asarray(low), jnp.asarray(high))


def mean_of_held_out(value: RowSum) -> np.ndarray:
    """The mean row `[L]`; ValueError if no image is held out."""
    if not value.num_images:
        raise ValueError(
            "none of the training images is held out, by which deviations are measured: give more "
            "images, or hold out more of them (held_out)"
        )
    mean: np.ndarray = value.sum / value.num_images
    return mean


def _widen(left: Extremes, right: Extremes) -> Extremes:
    return Extremes(np.minimum(left.low, right.low), np.maximum(left.high, right.high))
