import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradnorm_jax.metrics import (
    auroc,
    auroc_covariance,
    compare_scores,
    compare_with_best,
    delong_test,
    evaluate_scores,
    fpr_at_tpr,
    fpr_test,
    holm,
    influence,
    ranked,
    resampling,
)

PAIRED = (
    "auroc",
    "aupr_in",
    "aupr_out",
    "fpr_at_95_tpr_id_positive",
    "fpr_at_95_tpr_ood_positive",
)


def draw_pair(seed, id_count=60, ood_count=40, shift=(1.0, 1.0), decimals=9):
    """Scores of two detectors that share most of their noise, id_a, ood_a, id_b, ood_b."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=id_count), rng.normal(size=ood_count)
    return [
        (each + 0.5 * rng.normal(size=each.size) + at).round(decimals)
        for shift_of in shift
        for each, at in zip(common, (shift_of, 0.0), strict=True)
    ]


def placements(id_scores, ood_scores):
    """By definition, over all pairs: of each ID input and of each OOD input."""
    wins = np.heaviside(np.subtract.outer(id_scores, ood_scores), 0.5)
    return wins.mean(axis=1), wins.mean(axis=0)


def test_delong_by_hand():
    # Placements of A: ID 1/2, 1; OOD 1, 1/2. Of B: ID 0, 1; OOD 1/2, 1/2. Their differences 1/2, 0
    # and 1/2, 0 have the variance 1/8, and so the means of two each 1/16.
    test = delong_test([2, 4], [1, 3], [1, 4], [2, 3])
    assert test.difference == 0.25
    assert test.standard_error == pytest.approx(math.sqrt(1 / 8), rel=1e-15)
    assert test.p_value == pytest.approx(math.erfc(0.5), rel=1e-15)
    margin = 1.959963984540054 * math.sqrt(1 / 8)
    assert (test.low, test.high) == pytest.approx((0.25 - margin, 0.25 + margin), rel=1e-14)
    assert str(test) == "+25.00% (-44.30% to +94.30%), p = 0.48"


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_delong_equals_the_covariance_over_all_pairs(decimals):
    id_a, ood_a, id_b, ood_b = draw_pair(0, decimals=decimals)
    of_a, of_b = placements(id_a, ood_a), placements(id_b, ood_b)
    covariance = sum(np.cov(x, y) / len(x) for x, y in zip(of_a, of_b, strict=True))
    values, found = auroc_covariance([id_a, id_b], [ood_a, ood_b])
    np.testing.assert_allclose(found, covariance, rtol=1e-12)
    np.testing.assert_allclose(values, [of_a[0].mean(), of_b[0].mean()], rtol=1e-14)
    test = delong_test(id_a, ood_a, id_b, ood_b)
    assert test.difference == auroc(id_a, ood_a) - auroc(id_b, ood_b)
    expected = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert test.standard_error == pytest.approx(expected, rel=1e-12)


few = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=7)


@given(few, few)
def test_influence_is_the_derivative_by_the_weights_of_inputs(id_scores, ood_scores):
    def average_precision(id_weights, ood_weights, sign=1):
        at = sign * np.concatenate([id_scores, ood_scores])
        weights = np.concatenate([id_weights, ood_weights])
        is_id = np.arange(at.size) < len(id_scores)
        positive = is_id if sign == 1 else ~is_id
        total = 0.0
        for score in at:
            reached = weights * (at >= score)
            same = (weights * positive * (at == score)).sum() / (at == score).sum()
            total += same * (reached * positive).sum() / reached.sum()
        return total / (weights * positive).sum()

    ranking, *places = ranked.rank_inputs(np.array(id_scores), np.array(ood_scores))
    ones = np.ones(len(id_scores)), np.ones(len(ood_scores))
    for sign, function in (
        (1, influence.average_precision),
        (-1, influence.average_precision_of_ood),
    ):
        for which, (values, place) in enumerate(zip(function(ranking), places, strict=True)):
            slopes = []
            for i in range(place.size):
                sides = []
                for step in (1e-5, -1e-5):
                    weights = [each.copy() for each in ones]
                    weights[which][i] += step
                    # Their sum is given, as it is in a resample.
                    weights[which] *= place.size / weights[which].sum()
                    sides.append(average_precision(*weights, sign))
                slopes.append(place.size * (sides[0] - sides[1]) / 2e-5)
            expected = values[place] - values[place].mean()
            np.testing.assert_allclose(slopes, expected, atol=1e-8)


def test_pairs_are_surer_than_independent_samples():
    sets = draw_pair(1, 300, 200)
    a, b = evaluate_scores(*sets[:2]).auroc, evaluate_scores(*sets[2:]).auroc
    separate = math.hypot(a.high - a.low, b.high - b.low) / (2 * 1.959963984540054)
    assert delong_test(*sets).standard_error < 0.6 * separate
    # In another order detector B has seen other inputs of the same kind.
    unpaired = [*sets[:2], *(np.random.default_rng(0).permutation(each) for each in sets[2:])]
    assert fpr_test(*sets).standard_error < 0.8 * fpr_test(*unpaired).standard_error


def test_the_order_of_inputs_and_detectors_does_not_matter():
    sets = draw_pair(2, decimals=1)
    rng = np.random.default_rng(0)
    id_order, ood_order = rng.permutation(60), rng.permutation(40)
    shuffled = [each[order] for each, order in zip(sets, [id_order, ood_order] * 2, strict=True)]
    for name, test in compare_scores(*sets).items():
        swapped = compare_scores(*sets[2:], *sets[:2])[name]
        assert swapped.difference == -test.difference
        assert swapped.standard_error == pytest.approx(test.standard_error, rel=1e-12)
        assert (swapped.low, swapped.high) == pytest.approx((-test.high, -test.low), rel=1e-12)
        assert swapped.p_value == pytest.approx(test.p_value, rel=1e-12)
        again = compare_scores(*shuffled)[name]
        assert again.difference == test.difference
        # The bootstrap draws inputs by their place.
        rel = 0.15 if name.startswith("fpr") else 1e-12
        assert again.standard_error == pytest.approx(test.standard_error, rel=rel)


def brute_force(positives, negatives, tpr, count, rng):
    """`resampling.paired_fpr` for one block, input by input."""
    draws = [
        [rng.integers(size, size=size) for _ in range(count)]
        for size in (positives.shape[1], negatives.shape[1])
    ]
    return [
        [fpr_at_tpr(p[i], n[o], tpr=tpr) for p, n in zip(positives, negatives, strict=True)]
        for i, o in zip(*draws, strict=True)
    ]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 9), (3000, 400)])
@pytest.mark.parametrize("decimals", [0, 9])
@pytest.mark.parametrize("tpr", [0.95, 0.3, 1.0])
def test_replicates_equal_resampling_input_by_input(sizes, decimals, tpr):
    rng = np.random.default_rng(3)
    positives, negatives = (rng.normal(size=(3, size)).round(decimals) for size in sizes)
    found = resampling.paired_fpr(positives, negatives, tpr, 20, np.random.default_rng(4))
    expected = brute_force(positives, negatives, tpr, 20, np.random.default_rng(4))
    np.testing.assert_array_equal(found, expected)


def test_replicates_come_in_blocks(monkeypatch):
    positives, negatives = np.random.default_rng(5).normal(size=(2, 2, 50))
    monkeypatch.setattr(resampling, "_BLOCK", 350)  # seven replicates
    found = resampling.paired_fpr(positives, negatives, 0.95, 20, np.random.default_rng(6))
    rng = np.random.default_rng(6)
    expected = [brute_force(positives, negatives, 0.95, n, rng) for n in (7, 7, 6)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


def test_replicates_of_one_detector_have_the_distribution_of_resampling():
    ranking = ranked.rank([3, 3, 2, 2, 2, 1, 0, 0], [3, 2, 1, 1, 0])
    count = 20_000
    found = resampling.fpr(ranking, 0.8, count, np.random.default_rng(7))
    rng = np.random.default_rng(8)
    expected = [
        ranked.fpr_at_tpr(
            ranked.Ranking(*(rng.multinomial(c.sum(), c / c.sum()) for c in ranking)), 0.8
        )
        for _ in range(count)
    ]
    for value in np.arange(6) / 5:
        p, q = np.mean(found == value), np.mean(np.array(expected) == value)
        assert abs(p - q) < 4 * math.sqrt(2 * max(p, q) / count) + 1e-12


@pytest.mark.slow
def test_equally_good_detectors_are_told_apart_as_often_as_the_level_says():
    trials = 400
    tests = [compare_scores(*draw_pair(seed, 200, 200)) for seed in range(trials)]
    rejected = {name: sum(test[name].p_value < 0.05 for test in tests) for name in PAIRED}
    # 20, and three standard deviations of a binomial.
    assert all(7 <= count <= 33 for count in rejected.values()), rejected
    covered = {name: sum(t[name].low <= 0 <= t[name].high for t in tests) for name in PAIRED}
    assert all(count >= 367 for count in covered.values()), covered


def test_a_better_detector_is_found():
    better = compare_scores(*draw_pair(9, 1000, 1000, shift=(2.0, 1.5)))
    for name, test in better.items():
        sign = -1 if name.startswith("fpr") else 1
        assert sign * test.difference > 0
        assert test.p_value < 1e-4
        assert test.low <= test.difference <= test.high


@pytest.mark.parametrize(
    ("a", "b", "difference", "p_value"),
    [
        (([1, 2, 2, 5], [0, 2, 3]), ([1, 2, 2, 5], [0, 2, 3]), 0, 1),  # identical
        (([1, 1, 1], [1, 1]), ([1, 1, 1], [1, 1]), 0, 1),  # constant
        (([5, 6, 7], [1, 2]), ([8, 8, 9], [0, 0]), 0, 1),  # both perfect
        (([5, 6, 7], [1, 2]), ([1, 1, 1], [1, 1]), 0.5, 0),  # neither varies
        (([5], [1, 2, 3]), ([0], [1, 2, 3]), 1, 1),  # one input tells nothing
        (([5, 6, 7], [1]), ([0, 1, 2], [3]), 1, 1),
    ],
)
def test_degenerate_scores(a, b, difference, p_value):
    tests = compare_scores(*a, *b)
    assert tests["auroc"].difference == difference
    for test in tests.values():
        assert test.p_value == p_value
        assert -1 <= test.low <= test.difference <= test.high <= 1
        assert math.isfinite(test.standard_error)


def test_holm_by_hand():
    # In order .005 x 4, .01 x 3, .03 x 2, and .04 x 1, which may not be below the one before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_array_equal(holm([0.6, 0.7, 0.0]), [1, 1, 0])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match=r"p_values .* \[0.5, nan\]"):
        holm([0.5, math.nan])


def make_family(seed=0, count=400, shifts=(1.0, 1.05, 2.0, 2.0)):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(2, count))
    names = [f"d{i}" for i in range(len(shifts))]
    ids = {
        d: common[0] + s + 0.3 * rng.normal(size=count) for d, s in zip(names, shifts, strict=True)
    }
    return ids, {d: common[1] + 0.3 * rng.normal(size=count) for d in names}


def test_the_best_and_those_that_are_not_worse():
    ids, oods = make_family()
    for metric, best in compare_with_best(ids, oods, PAIRED).items():
        assert best.detector in ("d2", "d3")
        assert best.leaders() == {"d2", "d3"}
        assert best.leaders(0.0) == set(ids)
        # The same tests as two by two, all at the same draws.
        for other, comparison in best.comparisons.items():
            pair = [(ids[d], oods[d]) for d in (best.detector, other)]
            assert comparison == compare_scores(*pair[0], *pair[1])[metric]
        p_values = [each.p_value for each in best.comparisons.values()]
        np.testing.assert_array_equal(list(best.adjusted.values()), holm(p_values))


def test_one_detector_is_the_best():
    best = compare_with_best({"a": [1, 2]}, {"a": [0, 3]})["auroc"]
    assert (best.detector, best.leaders()) == ("a", {"a"})


def test_the_first_of_equals_is_the_best():
    best = compare_with_best({"a": [1, 2], "b": [1, 2]}, {"a": [0, 3], "b": [0, 3]})["auroc"]
    assert (best.detector, best.leaders()) == ("a", {"a", "b"})


def test_scores_of_different_inputs_are_refused():
    for test in (delong_test, fpr_test, compare_scores):
        with pytest.raises(ValueError, match=r"id_a and id_b .* got 2 and 1"):
            test([1, 2], [3], [1], [3])
        with pytest.raises(ValueError, match="ood_b must be finite"):
            test([1, 2], [3], [1, 3], [math.inf])
        with pytest.raises(ValueError, match=r"confidence .* got 95"):
            test([1, 2], [3], [1, 3], [2], confidence=95)
    with pytest.raises(ValueError, match=r"id_scores must be of the same inputs, .* 'b': 1"):
        compare_with_best({"a": [1, 2], "b": [1]}, {"a": [1], "b": [1]})
    with pytest.raises(ValueError, match="same detectors, at least one, got a and b"):
        compare_with_best({"a": [1, 2]}, {"b": [1]})
    with pytest.raises(ValueError, match=r"metrics must be among auroc, .*, got detection_error"):
        compare_with_best({"a": [1]}, {"a": [1]}, ["detection_error"])
    with pytest.raises(ValueError, match=r"same K detectors .* \(2, 3\) and \(1, 3\)"):
        auroc_covariance(np.zeros((2, 3)), np.zeros((1, 3)))
