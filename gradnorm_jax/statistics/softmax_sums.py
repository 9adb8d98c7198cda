"""Sums of softmax probabilities by predicted class: the templates of KL matching."""

from typing import NamedTuple

import numpy as np

from gradnorm_jax.statistics.softmax import softmax
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class SoftmaxSums(NamedTuple):
    """Sums of p = softmax(logits) over the images predicted as each of K classes that occur.

    Attributes:
        classes: `[K]` int64, ascending.
        counts: `[K]`, images predicted as each.
        sums: `[K, C]`, of p.
    """

    classes: np.ndarray
    counts: np.ndarray
    sums: np.ndarray


def softmax_sums(logits: np.ndarray) -> SoftmaxSums:
    """The sums of logits `[N, C]`, in float64."""
    return _by_class(logits.argmax(axis=1), np.ones(len(logits)), softmax(logits))


def log_templates(sums: SoftmaxSums) -> np.ndarray:
    """Logarithms `[K, C]` of the mean p of each predicted class; ValueError if there are none.

    A mean that is zero in float64 counts as the smallest number, not as impossible.
    """
    if not len(sums.classes):
        raise ValueError("no training images to fit to; give at least one")
    means = sums.sums / sums.counts[:, None]
    return np.log(np.maximum(means, np.finfo(np.float64).tiny))


def _by_class(classes: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> SoftmaxSums:
    present, index = np.unique(classes, return_inverse=True)
    total = np.zeros((len(present), sums.shape[1]))
    np.add.at(total, index, sums)
    return SoftmaxSums(present, np.bincount(index, counts, len(present)), total)


def _none(head: LinearHead) -> SoftmaxSums:
    return softmax_sums(np.zeros((0, head.kernel.shape[1])))


def _update(value: SoftmaxSums, examples: Examples) -> SoftmaxSums:
    return _merge(value, softmax_sums(examples.logits))


def _merge(left: SoftmaxSums, right: SoftmaxSums) -> SoftmaxSums:
    return _by_class(*map(np.concatenate, zip(left, right, strict=True)))


SOFTMAX_SUMS = Statistic("softmax sums", _none, _update, _merge)
"""Of the softmax, by predicted class."""
