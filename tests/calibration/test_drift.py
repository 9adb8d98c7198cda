"""The running test of exchangeability: by its formulas, and on simulated streams."""

import itertools

import numpy as np
import pytest
from scipy import integrate, stats

from gradnorm_jax.calibration import (
    init_drift,
    init_martingale,
    update_drift,
    update_martingale,
)

RNG = np.random.default_rng(0)
SHAPES = [(1 / 8, 1), (1 / 2, 1), (1, 2), (1, 1 / 2), (2, 1), (1 / 2, 1 / 2), (2, 2)]
BETS = [(c, *shape) for shape in SHAPES for c in (0.1, 1)]


def density(p, bet):
    fraction, a, b = bet
    return 1 - fraction + fraction * stats.beta(a, b).pdf(p)


def test_the_wealth_is_the_mixture_that_it_is_said_to_be():
    p = np.array([0.3, 0.02, 0.9, 1e-6, 1 - 1e-9, 0.5])
    expected = []
    for t in range(1, len(p) + 1):
        wealth = (t + 1) ** -0.5
        for k in range(1, t + 1):
            gains = [np.prod(density(p[k - 1 : t], bet)) for bet in BETS]
            wealth += (k**-0.5 - (k + 1) ** -0.5) * np.mean(gains)
        expected.append(np.log(wealth))
    state, log_wealth = update_martingale(init_martingale(), p)
    np.testing.assert_allclose(log_wealth, expected, rtol=1e-9)
    assert state.p_value == pytest.approx(np.exp(-max(expected)))
    half, first = update_martingale(init_martingale(), p[:2])
    rest = update_martingale(half, p[2:])[1]
    np.testing.assert_array_equal(np.concatenate([first, rest]), log_wealth)


def test_the_odds_are_fair():
    start, _ = update_martingale(init_martingale(), [0.01, 0.2])  # stakes of several sizes

    def wealth(p):
        return np.exp(update_martingale(start, [p])[1][0])

    before = np.exp(update_martingale(init_martingale(), [0.01, 0.2])[1][-1])
    # In pieces, because densities are infinite at the ends.
    ends = [0, 1e-12, 1e-8, 1e-4, 0.01, 0.5, 0.99, 1 - 1e-4, 1 - 1e-8, 1]
    pieces = [integrate.quad(wealth, *piece)[0] for piece in itertools.pairwise(ends)]
    assert sum(pieces) == pytest.approx(before, rel=1e-4)


def test_ranks_are_among_calibration_and_earlier_inputs():
    calibration = RNG.integers(10, size=15).astype(np.float32)
    stream = RNG.integers(-1, 11, size=700).astype(np.float32)
    _, drift = update_drift(init_drift(calibration, seed=3), stream)
    uniforms = 1 - np.random.Generator(np.random.PCG64(3)).random(700)
    for i in (0, 1, 14, 255, 256, 300, 699):
        earlier = np.concatenate([calibration, stream[:i]])
        below, equal = (earlier < stream[i]).sum(), (earlier == stream[i]).sum()
        expected = (below + uniforms[i] * (equal + 1)) / (len(earlier) + 1)
        assert drift.rank[i] == pytest.approx(expected, rel=1e-12)
    for size in (1, 7, 300):
        other, parts = init_drift(calibration, seed=3), []
        for start in range(0, 700, size):
            other, part = update_drift(other, stream[start : start + size])
            parts.append(part)
        for name in drift._fields:
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(drift, name), err_msg=name)
        assert len(other.scores) <= np.log2(715) + 1
        kept = np.sort(np.concatenate(other.scores))
        np.testing.assert_array_equal(kept, np.sort(np.concatenate([calibration, stream])))


@pytest.mark.parametrize("ties", [False, True])
def test_false_alarms_are_as_rare_as_promised(ties):
    draws, length, alpha = 400, 300, 0.2
    found = 0
    for seed in range(draws):
        scores = RNG.normal(size=20 + length)
        if ties:
            scores = scores.round()
        _, drift = update_drift(init_drift(scores[:20], seed), scores[20:])
        found += drift.p_value[-1] <= alpha
    assert found / draws <= alpha + 4 * np.sqrt(alpha * (1 - alpha) / draws)
    assert found / draws > 0.02  # the test is not idle


@pytest.mark.parametrize(
    ("change", "delay"),
    [
        (lambda x: x - 4, 10),
        (lambda x: x - 1, 100),
        (lambda x: x + 1, 100),
        (lambda x: 3 * x, 50),
        (lambda x: x / 3, 100),
        (lambda x: np.where(RNG.random(len(x)) < 0.3, x - 4, x), 80),
    ],
)
def test_changes_are_found(change, delay):
    calibration, before, after = (RNG.normal(size=n) for n in (1000, 500, 300))
    _, drift = update_drift(init_drift(calibration), np.concatenate([before, change(after)]))
    assert drift.p_value[499] > 0.01
    assert drift.p_value[499 + delay] <= 0.01
    assert (np.diff(drift.p_value) <= 0).all()


def test_overwhelming_evidence_does_not_overflow():
    state, log_wealth = update_martingale(init_martingale(), np.full(3000, 1e-12))
    assert np.isfinite(log_wealth).all()
    assert log_wealth[-1] > 50_000
    assert state.p_value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_drift([]), r"calibration_scores must be \[n\] with n >= 1"),
        (lambda: init_drift([1, np.inf]), "calibration_scores must be .* 1 that are not"),
        (lambda: update_drift(init_drift([1]), [np.nan]), "scores must be .* leave those out"),
        (lambda: update_drift(init_drift([1]), 3.0), r"scores must be \[n\] finite numbers, got"),
        (lambda: update_martingale(init_martingale(), [1.0]), "above 0 and below 1, got"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
