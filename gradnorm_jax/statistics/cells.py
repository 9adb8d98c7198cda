"""Sums of features by pair of true and predicted class, of the pairs that occur alone."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.gradient_subspace import CellSubspace
from gradnorm_jax.statistics.class_moments import check_labels
from gradnorm_jax.statistics.directions import count_to_share
from gradnorm_jax.statistics.moments import principal_axes
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class Cells(NamedTuple):
    """Sums over features with an appended 1, by pair of classes, in the order of the pairs.

    Attributes:
        pairs: `[N, 2]` int64, true and predicted class.
        sums: `[N, D + 1]`; the last entry counts images.
    """

    pairs: np.ndarray
    sums: np.ndarray


def cell_subspace(cells: Cells, share: float = 0.99) -> CellSubspace:
    """The principal subspace of class means of the gradients of the largest logit.

    Means are of the images of a true class, each class counts once, and those without images are
    left out. The subspace has as few directions as hold `share` of their variance. It is found
    through their inner products, `[K, K]` for K classes: gradients are never formed.

    Raises:
        ValueError: there are fewer than two classes with images, or their means are all the same.
    """
    if not len(cells.pairs):
        raise ValueError("no labelled training images to fit class means to")
    _, rows = np.unique(cells.pairs[:, 0], return_inverse=True)
    counts = np.bincount(rows, cells.sums[:, -1])
    means, predictions = cells.sums / counts[rows, None], cells.pairs[:, 1]
    products = np.zeros((len(counts), len(counts)))
    for prediction in np.unique(predictions):
        column = predictions == prediction
        # A true class has one cell in a column at most, so none is added to twice.
        products[np.ix_(rows[column], rows[column])] += means[column] @ means[column].T
    with_mean = products.mean(axis=1)
    centred = products - with_mean[:, None] - with_mean[None] + with_mean.mean()
    values, vectors = principal_axes(centred)
    kept = count_to_share(values, share)
    # Coordinates of a gradient are its products with the class means, times these.
    axes = vectors[:, :kept] / np.sqrt(values[:kept])
    weights = np.full((len(counts), 1), 1 / len(counts))
    arrays = (np.concatenate([axes, weights], axis=1)[rows], with_mean @ axes, with_mean.mean())
    return CellSubspace(jnp.asarray(means), jnp.asarray(predictions), *map(jnp.asarray, arrays))


def _none(head: LinearHead) -> Cells:
    return Cells(np.zeros((0, 2), np.int64), np.zeros((0, len(head.kernel) + 1)))


def _update(value: Cells, examples: Examples) -> Cells:
    check_labels(examples.labels, examples.logits.shape[1])
    pairs = np.stack([examples.labels, examples.logits.argmax(axis=-1)], axis=1).astype(np.int64)
    features = np.asarray(examples.features, np.float64)
    present, cells = np.unique(pairs, axis=0, return_inverse=True)
    sums = np.zeros((len(present), features.shape[1] + 1))
    np.add.at(sums, cells.reshape(-1), np.insert(features, features.shape[1], 1, axis=1))
    return _merge(value, Cells(present, sums))


def _merge(left: Cells, right: Cells) -> Cells:
    pairs, cells = np.unique(np.concatenate([left.pairs, right.pairs]), axis=0, return_inverse=True)
    of_left, of_right = np.split(cells.reshape(-1), [len(left.pairs)])
    sums = np.zeros((len(pairs), left.sums.shape[1]))
    # No pair occurs twice in either.
    sums[of_left] = left.sums
    sums[of_right] += right.sums
    return Cells(pairs, sums)


CELLS = Statistic("sums by true and predicted class", _none, _update, _merge, needs_labels=True)
"""Of the features with an appended 1, by pair of true and predicted class."""
