import numpy as np
import pytest
from scipy.special import logsumexp

from gradnorm_jax.statistics import Examples
from gradnorm_jax.statistics.bank import bank, bank_rows
from gradnorm_jax.types import LinearHead

HEAD = LinearHead(np.zeros((3, 2)), np.zeros(2))
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(5000, 3)).astype(np.float32)
LOGITS = RNG.normal(size=(5000, 2))
LABELS = RNG.integers(2, size=5000).astype(np.int32)


def fill(statistic, positions, batch_size):
    value = statistic.init(HEAD)
    for start in range(0, len(positions), batch_size):
        rows = positions[start : start + batch_size]
        examples = Examples(FEATURES[rows], LOGITS[rows], LABELS[rows], rows)
        value = statistic.update(value, examples)
    return value


def test_the_same_images_whatever_the_batches_order_and_split():
    statistic = bank(100)
    whole = fill(statistic, np.arange(5000), 5000)
    expected = bank_rows(whole, 100)
    assert len(expected.keys) == 100
    order = RNG.permutation(5000)
    for batch_size in (7, 640):
        assert_same(bank_rows(fill(statistic, order, batch_size), 100), expected)
        parts = [fill(statistic, part, batch_size) for part in np.split(order, [10, 3000])]
        merged = statistic.merge(statistic.merge(parts[2], parts[0]), parts[1])
        assert int(merged.num_images) == 5000
        assert_same(bank_rows(merged, 100), expected)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_keeps_what_belongs_together():
    rows = bank_rows(fill(bank(50), np.arange(5000), 333), 50)
    for feature, energy, label, prediction in zip(*rows[1:], strict=True):
        (at,) = np.flatnonzero((feature == FEATURES).all(axis=1))
        assert energy == pytest.approx(logsumexp(LOGITS[at]))
        assert (label, prediction) == (LABELS[at], LOGITS[at].argmax())


def test_the_sample_is_even():
    # A position's hash has nothing to do with where it is: about half of the images of either half.
    keys = bank_rows(fill(bank(1000), np.arange(5000), 500), 1000).features
    in_first_half = np.isin(keys[:, 0], FEATURES[:2500, 0]).sum()
    assert abs(in_first_half - 500) < 60


def test_fewer_images_than_fit_are_all_kept():
    assert len(bank_rows(fill(bank(100), np.arange(30), 8), 100).keys) == 30
    with pytest.raises(ValueError, match="no training images"):
        bank_rows(bank(100).init(HEAD), 100)


def test_equal_banks_are_one_statistic():
    assert bank(100) is bank(100)
    assert bank(100) != bank(101)
