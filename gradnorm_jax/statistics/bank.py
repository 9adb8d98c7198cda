"""A sample of training images that does not depend on how they came."""

import functools
from typing import NamedTuple

import numpy as np

from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead

SIZE = 50_000
"""How many images a bank holds by default: all of CIFAR's."""


class Rows(NamedTuple):
    """What is kept of images, an entry for each.

    Attributes:
        keys: `[M]` uint64, hash of the image's position.
        features: `[M, D]` float32.
        energies: `[M]`, logsumexp of the logits.
        labels: `[M]` int32, -1 where unknown.
        predictions: `[M]` int32, the largest logit.
    """

    keys: np.ndarray
    features: np.ndarray
    energies: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray


class Bank(NamedTuple):
    """The images whose hashes are the smallest of all seen.

    Attributes:
        num_images: `[]`, how many have been seen.
        rows: by rising hash.
        pending: seen since, and not yet sorted in: that copies everything.
    """

    num_images: np.ndarray
    rows: Rows
    pending: Rows


@functools.cache
def bank(size: int = SIZE) -> Statistic:
    """A bank of at most `size` images, of which it takes 4 size (D + 5) bytes.

    50,000 images of 2048 features are 411 MB. Which images are kept follows from their positions
    alone: the same for any batches, order, split and number of processes.
    """

    def update(value: Bank, examples: Examples) -> Bank:
        keys = hash_positions(examples.positions)
        if len(value.rows.keys) == size:
            examples = Examples(*(x[keys < value.rows.keys[-1]] for x in examples))
        pending = _concatenate(value.pending, _rows(examples))
        num_images = value.num_images + len(keys)
        if len(pending.keys) <= max(1024, size // 8):
            return Bank(num_images, value.rows, pending)
        return Bank(num_images, _smallest(size, value.rows, pending), _first(pending, 0))

    def merge(left: Bank, right: Bank) -> Bank:
        rows = _smallest(size, left.rows, left.pending, right.rows, right.pending)
        return Bank(left.num_images + right.num_images, rows, _first(rows, 0))

    def remark(value: Bank) -> str | None:
        if value.num_images <= size:
            return None
        return (
            f"Detectors that look up training images do so among {size:,} of "
            f"{int(value.num_images):,}; their options set how many (bank_size, or size)."
        )

    return Statistic(f"bank of {size}", _none, update, merge, remark=remark)


def bank_rows(value: Bank, size: int = SIZE) -> Rows:
    """What `bank(size)` holds, by rising hash; ValueError if that is nothing."""
    if not value.num_images:
        raise ValueError("no training images to fit to; give at least one")
    return _smallest(size, value.rows, value.pending)


def _rows(examples: Examples) -> Rows:
    logits = np.asarray(examples.logits, np.float64)
    largest = logits.max(axis=1, keepdims=True, initial=-np.inf)
    energies = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
    return Rows(
        hash_positions(examples.positions),
        np.asarray(examples.features, np.float32),
        energies,
        np.asarray(examples.labels, np.int32),
        logits.argmax(axis=1).astype(np.int32),
    )


def _none(head: LinearHead) -> Bank:
    num_features, num_classes = head.kernel.shape
    nothing = np.zeros(0, np.int64)
    examples = Examples(np.zeros((0, num_features)), np.zeros((0, num_classes)), nothing, nothing)
    return Bank(np.array(0), _rows(examples), _rows(examples))


def hash_positions(positions: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 2^64 by which to sample, whatever the order: `[B]` int64 -> `[B]` uint64.

    The mixing of SplitMix64 (Steele, Lea, Flood 2014): no two positions have the same hash.
    """
    x = positions.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _concatenate(*several: Rows) -> Rows:
    return Rows(*map(np.concatenate, zip(*several, strict=True)))


def _smallest(size: int, *several: Rows) -> Rows:
    keys = np.concatenate([rows.keys for rows in several])
    chosen = np.argsort(keys)[:size]
    return Rows(*(np.concatenate(x)[chosen] for x in zip(*several, strict=True)))


def _first(rows: Rows, count: int) -> Rows:
    return Rows(*(x[:count] for x in rows))
