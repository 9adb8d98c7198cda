"""Ranges by predicted class and deviations from them, against a loop over images."""

import numpy as np
import pytest

from gradnorm_jax import scores
from gradnorm_jax.statistics import Examples
from gradnorm_jax.statistics.gram_ranges import (
    extremes,
    gram_ranges,
    held_out_sum,
    is_held_out,
    mean_of_held_out,
)
from gradnorm_jax.types import LinearHead

CLASSES, WIDTH, COUNT = 4, 6, 60
HEAD = LinearHead(np.zeros((WIDTH, CLASSES)), np.zeros(CLASSES))


def examples():
    """None of which is predicted to be of the last class."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(COUNT, WIDTH)) + 2
    logits = rng.normal(size=(COUNT, CLASSES)) - [0, 0, 0, 99]
    return Examples(rows, logits, np.full(COUNT, -1), np.arange(COUNT))


def learned(statistic, parts):
    values = [statistic.update(statistic.init(HEAD), Examples(*part)) for part in parts]
    return statistic.merge(*values) if len(values) > 1 else values[0]


def split(several, at):
    return [[x[:at] for x in several], [x[at:] for x in several]]


@pytest.mark.parametrize("per_class", [True, False])
def test_ranges_and_deviations(per_class):
    several = examples()
    low, high = gram_ranges(learned(extremes(0.2, per_class), split(several, 17)))
    held_out, predicted = is_held_out(several.positions, 0.2), several.logits.argmax(axis=1)
    assert 0 < held_out.sum() < COUNT / 2
    for c in range(CLASSES):
        of_class = (predicted == c) | (not per_class) | (c == CLASSES - 1)
        rows = several.features[~held_out & of_class]
        i = c if per_class else 0
        np.testing.assert_allclose(low[i], rows.min(axis=0), rtol=1e-6)
        np.testing.assert_allclose(high[i], rows.max(axis=0), rtol=1e-6)

    layers = {"a": 2 * several.features[:, :2], "b": -several.features[:, 2:]}
    found = scores.gram_deviations(layers, several.logits, scores.GramRanges(low, high))
    for n, row in enumerate(np.concatenate(list(layers.values()), axis=1)):
        i = predicted[n] if per_class else 0
        off = np.maximum(low[i] - row, 0) / np.abs(low[i] + 1e-6)
        off += np.maximum(row - high[i], 0) / np.abs(high[i] + 1e-6)
        np.testing.assert_allclose(found[n], [off[:2].sum(), off[2:].sum()], rtol=2e-5)
    assert (np.asarray(found) > 0).any(axis=0).all()


def test_means_of_what_is_held_out():
    several = examples()
    total = learned(held_out_sum(0.2), split(several, 23))
    expected = several.features[is_held_out(several.positions, 0.2)].mean(axis=0)
    np.testing.assert_allclose(mean_of_held_out(total), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="none of the training images is held out"):
        mean_of_held_out(learned(held_out_sum(1e-9), [several]))
    with pytest.raises(ValueError, match="no training images to fit to that are not held out"):
        gram_ranges(learned(extremes(1 - 1e-12, True), [several]))
