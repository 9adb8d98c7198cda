"""Guarantees of p-values and thresholds: by hand, and by drawing calibration sets many times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gradnorm_jax.calibration import (
    benjamini_hochberg,
    conformal_p_values,
    threshold_at_tpr,
    tpr_interval,
)
from gradnorm_jax.calibration.conformal import threshold_rank

RNG = np.random.default_rng(0)


def margin(rate, draws):
    """Four standard deviations of a fraction of that many draws."""
    return 4 * np.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize(
    ("calibration", "scores", "expected"),
    [
        ([4, 2, 3, 1], [0, 1, 2.5, 4, 5], [1 / 5, 2 / 5, 3 / 5, 1, 1]),
        ([1, 1, 1, 2], [0.5, 1, 1.5, 2], [1 / 5, 4 / 5, 4 / 5, 1]),
        ([3], [2, 3, -np.inf, np.nan], [1 / 2, 1, 1 / 2, np.nan]),
    ],
)
def test_p_values_by_hand(calibration, scores, expected):
    np.testing.assert_allclose(conformal_p_values(calibration, scores), expected, rtol=1e-6)
    jitted = jax.jit(conformal_p_values)(jnp.array(calibration), jnp.array(scores))
    np.testing.assert_allclose(jitted, expected, rtol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_p_values_keep_their_level(ties):
    draws, count = 20_000, 19
    scores = RNG.normal(size=(draws, count + 1)).astype(np.float32)
    if ties:
        scores = scores.round()
    p_values = np.asarray(jax.vmap(conformal_p_values)(scores[:, 1:], scores[:, 0]))
    for level in (0.05, 0.1, 0.33, 0.5, 0.8):
        found = np.mean(p_values <= np.float32(level))
        exact = np.floor(level * (count + 1) + 1e-9) / (count + 1)
        assert found <= level + margin(level, draws), level
        if not ties:
            assert abs(found - exact) <= margin(exact, draws), level


@pytest.mark.parametrize(
    ("count", "tpr", "confidence", "rank"),
    [
        (19, 0.95, None, 1),
        (99, 0.95, None, 5),
        (98, 0.95, None, 4),
        (1, 0.5, None, 1),
        # The sizes of tables of one-sided tolerance limits.
        (59, 0.95, 0.95, 1),
        (92, 0.95, 0.95, 1),
        (93, 0.95, 0.95, 2),
        (299, 0.99, 0.95, 1),
    ],
)
def test_thresholds_by_hand(count, tpr, confidence, rank):
    assert threshold_rank(count, tpr, confidence) == rank
    scores = RNG.permutation(count).astype(np.float32)
    assert threshold_at_tpr(scores, tpr, confidence=confidence) == rank - 1


def test_a_threshold_is_where_p_values_are_at_most_its_level():
    calibration = RNG.integers(30, size=57).astype(np.float32)
    scores = np.arange(-1, 31, dtype=np.float32)
    p_values = conformal_p_values(calibration, scores)
    for tpr in (0.95, 0.9, 0.5, 0.07):
        below = scores < threshold_at_tpr(calibration, tpr)
        np.testing.assert_array_equal(below, p_values <= 1 - tpr + 1e-6)


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_thresholds_keep_their_true_positive_rate(confidence):
    draws, count, tpr = 4000, 150, 0.9
    calibration = RNG.uniform(size=(draws, count)).astype(np.float32)
    threshold = jax.jit(jax.vmap(lambda x: threshold_at_tpr(x, tpr, confidence=confidence)))
    rates = 1 - np.asarray(threshold(calibration))
    rank = threshold_rank(count, tpr, confidence)
    exact = stats.beta(count + 1 - rank, rank)
    assert abs(rates.mean() - exact.mean()) < 4 * exact.std() / np.sqrt(draws)
    if confidence is None:
        assert exact.mean() >= tpr
    else:
        kept, chance = np.mean(rates >= tpr), exact.sf(tpr)
        assert chance >= confidence
        assert abs(kept - chance) <= margin(chance, draws)
        assert stats.beta(count - rank, rank + 1).sf(tpr) < confidence  # one rank more fails
    interval = tpr_interval(count + 1 - rank, count, 0.9)
    covered = np.mean((interval.low <= rates) & (rates <= interval.high))
    assert covered >= 0.9 - margin(0.9, draws)


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [(95, 100, 0.88717, 0.98357), (0, 10, 0, 0.30850), (10, 10, 0.69150, 1), (1, 1, 0.025, 1)],
)
def test_intervals_are_clopper_and_pearsons(passed, total, low, high):
    interval = tpr_interval(passed, total)
    assert interval.value == passed / total
    np.testing.assert_allclose([interval.low, interval.high], [low, high], atol=1e-5)


def test_benjamini_hochberg_by_hand():
    # Limits at 5 % are 0.01, 0.02, 0.03, 0.04, 0.05: the third lowest is above its own.
    p_values = np.array([0.019, 0.039, 0.031, 0.005, 0.5], np.float32)
    expected = [True, True, True, True, False]
    np.testing.assert_array_equal(benjamini_hochberg(p_values), expected)
    np.testing.assert_array_equal(jax.jit(benjamini_hochberg)(p_values), expected)
    assert not benjamini_hochberg(p_values + np.float32(0.1)).any()
    np.testing.assert_array_equal(benjamini_hochberg([0.001, np.nan, 0.9]), [True, False, False])
    assert benjamini_hochberg(np.zeros(0, np.float32)).shape == (0,)


def test_benjamini_hochberg_keeps_its_false_discovery_rate():
    draws, fdr = 3000, 0.2
    calibration = RNG.normal(size=(draws, 200)).astype(np.float32)
    batches = RNG.normal(size=(draws, 50)).astype(np.float32)
    batches[:, 40:] -= 3
    p_values = jax.vmap(conformal_p_values)(calibration, batches)
    called = np.asarray(jax.jit(jax.vmap(lambda p: benjamini_hochberg(p, fdr)))(p_values))
    rates = called[:, :40].sum(axis=1) / np.maximum(called.sum(axis=1), 1)
    # At most the rate times the fraction of inputs that are in-distribution, and not far below.
    error = 4 * rates.std() / np.sqrt(draws)
    assert 0.8 * fdr - error - 0.01 <= rates.mean() <= 0.8 * fdr + error
    assert called[:, 40:].mean() > 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: threshold_at_tpr(np.arange(18.0)), "18 .* too few for tpr=0.95: give at least 19"),
        (
            lambda: threshold_at_tpr(np.arange(58.0), confidence=0.95),
            "58 .* tpr=0.95 with confidence 0.95: give at least 59",
        ),
        (lambda: threshold_at_tpr([1.0], 1.0), "tpr must be above 0 and below 1, got 1.0"),
        (lambda: threshold_at_tpr([1.0], confidence=1.0), "confidence must be between 0 and 1"),
        (lambda: conformal_p_values([], [1.0]), r"calibration_scores must be \[n\]"),
        (lambda: conformal_p_values([[1.0]], [1.0]), r"calibration_scores must be \[n\]"),
        (lambda: conformal_p_values([1.0, np.nan], [1.0]), "calibration_scores must be finite"),
        (lambda: tpr_interval(2, 1), "passed must be from 0 to total"),
        (lambda: benjamini_hochberg([0.5], 0.0), "fdr must be above 0 and below 1, got 0.0"),
        (lambda: benjamini_hochberg(0.5), r"p_values must be \[B\]"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
