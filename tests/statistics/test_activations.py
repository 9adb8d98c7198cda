import numpy as np
import pytest

from gradnorm_jax.statistics import Examples, learn
from gradnorm_jax.statistics.activations import (
    ACTIVATIONS,
    CONTRIBUTIONS,
    bucket_values,
    buckets,
    optimal_shaping,
    quantile,
)
from gradnorm_jax.types import LinearHead

HEAD = LinearHead(np.array([[1.0, -1.0], [2.0, 0.5]]), np.zeros(2))


def histogram(features):
    features = np.asarray(features, np.float32)
    logits, nothing = features @ HEAD.kernel, np.arange(len(features))
    known = learn(
        [ACTIVATIONS, CONTRIBUTIONS], HEAD, [Examples(features, logits, nothing, nothing)]
    )
    return known[ACTIVATIONS], known[CONTRIBUTIONS]


def test_numbers_are_within_their_bucket_and_in_order():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000) * 10.0 ** rng.integers(-30, 30, 10_000)
    values = np.sort(values.astype(np.float32))
    assert (np.diff(buckets(values)) >= 0).all()
    middles = bucket_values()[buckets(values)]
    assert (np.abs(middles - values) <= 2.0**-12 * np.abs(values)).all()
    np.testing.assert_array_equal(bucket_values()[buckets([0.0, -0.0])], [0, 0])


@pytest.mark.parametrize("q", [0, 0.001, 0.5, 0.6, 0.9, 0.999, 1])
def test_quantiles_are_those_of_all_activations(q):
    features = np.maximum(np.random.default_rng(1).normal(size=(3000, 2)), 0)
    found, expected = quantile(histogram(features)[0], q), np.quantile(features, q)
    assert abs(found - expected) <= 2.0**-12 * expected


def test_a_quantile_between_two_activations_is_interpolated():
    assert quantile(histogram([[0.0, 1.0]])[0], 0.25) == pytest.approx(0.25, rel=2.0**-12)


def test_what_activations_contribute_decides_their_factor():
    # Prediction 0, whose weights are 1 and 2: 1 adds 1 * 1 in the first bin, 3 adds 2 * 3 in the
    # second; the third, of the right end, is out.
    counts, contributions = histogram([[1.0, 3.0], [0.0, 4.0]])
    shaping = optimal_shaping(counts, contributions, 2, 0.0)
    assert float(shaping.left) == 0
    assert float(shaping.right) == pytest.approx(4, rel=2.0**-12)
    expected = 1000 * np.array([1.0, 6.0]) / np.hypot(1.0, 6.0)
    np.testing.assert_allclose(shaping.theta, expected, rtol=1e-3)


def test_what_cannot_be_said_is_refused():
    nothing, _ = histogram(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="no training images"):
        quantile(nothing, 0.5)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 1.5"):
        quantile(nothing, 1.5)
    with pytest.raises(ValueError, match="do not vary"):
        optimal_shaping(*histogram(np.zeros((3, 2))), 10, 0.001)
