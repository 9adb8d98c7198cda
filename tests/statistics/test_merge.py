"""Whatever the split, the order and the blocks, merging gives what one pass over all gives."""

import jax
import numpy as np
import pytest

from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.statistics import Examples, Statistic, learn, passes
from gradnorm_jax.statistics.average_gradients import gradient_sums
from gradnorm_jax.statistics.bank import SIZE, bank, bank_rows
from gradnorm_jax.statistics.neuron_counts import neuron_counts
from gradnorm_jax.types import LinearHead
from tests.last_layers import random_examples, random_head

FITS = [detector.fit for detector in parse_detectors(["all"]) if detector.fit]
# What the package's detectors learn, and what the default options of these leave out.
STATISTICS = {
    statistic.name: statistic
    for statistic in (
        *(each for fit in FITS for level in passes(fit.statistics) for each in level),
        gradient_sums(2),
        neuron_counts(12, 3.0),
        bank(9),
    )
}
# What is compared, where that is not the value itself.
VIEWS = {bank(size).name: lambda value, n=size: bank_rows(value, n) for size in (9, SIZE)}


@pytest.fixture(scope="module")
def head():
    return random_head(5, 4)


@pytest.fixture(scope="module")
def examples(head):
    """40 images of features about 100, which sums must not lose digits by."""
    drawn = random_examples(head, 40)
    features = (drawn.features + 100).astype(np.float32)
    return drawn._replace(features=features, logits=drawn.logits.astype(np.float32))


def start(statistic: Statistic, head: LinearHead, examples: Examples):
    """The value of no images, after earlier passes over all of them."""
    known = learn(statistic.after, head, [examples])
    return statistic.init(head, *(known[each] for each in statistic.after))


def rows(examples, chosen):
    return Examples(*(x[chosen] for x in examples))


def over(statistic, value, examples, block):
    for at in range(0, len(examples.labels), block):
        value = statistic.update(value, rows(examples, slice(at, at + block)))
    return value


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("split", [0, 1, 17])
def test_merging_is_learning_from_both(name, split, head, examples):
    statistic, view = STATISTICS[name], VIEWS.get(name, lambda value: value)
    zero = start(statistic, head, examples)
    whole = view(over(statistic, zero, examples, len(examples.labels)))
    order = np.random.default_rng(split).permutation(len(examples.labels))
    first = over(statistic, zero, rows(examples, order[:split]), 7)
    second = over(statistic, zero, rows(examples, order[split:]), 3)
    assert_same(view(statistic.merge(first, second)), whole)
    assert_same(view(statistic.merge(second, first)), whole)
    assert_same(view(statistic.merge(zero, statistic.merge(second, first))), whole)


@pytest.mark.parametrize("name", STATISTICS)
def test_values_stay_as_they_were(name, head, examples):
    statistic = STATISTICS[name]
    zero = start(statistic, head, examples)
    value = over(statistic, zero, rows(examples, slice(20)), 20)
    before = jax.tree.map(np.copy, (zero, value))
    statistic.merge(value, statistic.update(value, rows(examples, slice(20, None))))
    statistic.merge(zero, value)
    assert_same((zero, value), before)
