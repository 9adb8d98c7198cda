import dataclasses
import math
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from gradnorm_jax.metrics import (
    aupr_in,
    aupr_out,
    auroc,
    detection_error,
    evaluate_scores,
    fpr_at_tpr,
    threshold_at_tpr,
)

# Few distinct values make many ties.
tied = st.lists(st.sampled_from([-1.5, -1.0, 0.0, 0.25, 1e-300, 3.0]), min_size=1, max_size=12)
HUNDREDTHS = (np.arange(1000) + 0.5) / 1000
rates = st.sampled_from([0.01, 0.07, 0.1, 0.29, 0.5, 0.58, 0.9, 0.95, 0.99, 1.0])


def labelled(id_scores, ood_scores):
    return np.repeat([1, 0], [len(id_scores), len(ood_scores)]), np.concatenate(
        [id_scores, ood_scores]
    )


def test_hand_computed():
    id_scores, ood_scores = [3, 2, 2, 1], [2, 0]
    # Of 8 pairs ID wins 5 (3 > 2; all four > 0) and ties 2.
    assert auroc(id_scores, ood_scores) == 6 / 8
    # Precision and gain in recall going down: 1 x 1/4, 3/4 x 2/4, 4/5 x 1/4.
    assert aupr_in(id_scores, ood_scores) == pytest.approx(0.25 + 0.375 + 0.2, rel=1e-15)
    # Going up: 1 x 1/2, then the tied 2 with precision 2/5 x 1/2.
    assert aupr_out(id_scores, ood_scores) == pytest.approx(0.5 + 0.2, rel=1e-15)
    assert fpr_at_tpr(id_scores, ood_scores, tpr=0.75) == 0.5
    assert fpr_at_tpr(id_scores, ood_scores, tpr=0.25) == 0.0
    assert fpr_at_tpr(id_scores, ood_scores, tpr=0.5, positive="ood") == 0.0
    assert fpr_at_tpr(id_scores, ood_scores, tpr=0.95, positive="ood") == 0.75
    # Passing at 1 stops no ID and lets half of OOD pass.
    assert detection_error(id_scores, ood_scores) == 0.25


def test_the_two_conventions_of_fpr_differ():
    # To pass 19 of 20 ID the threshold must fall to 0, where all OOD pass; to stop 19 of 20 OOD it
    # need only be above 5, which stops 2 of 20 ID.
    id_scores, ood_scores = [10] * 18 + [0] * 2, [5] * 20
    assert fpr_at_tpr(id_scores, ood_scores, positive="id") == 1.0
    assert fpr_at_tpr(id_scores, ood_scores, positive="ood") == 0.1


@given(tied, tied, rates)
def test_equal_to_counting_over_all_pairs_and_thresholds(id_scores, ood_scores, tpr):
    wins = sum((a > b) + (a == b) / 2 for a in id_scores for b in ood_scores)
    assert auroc(id_scores, ood_scores) == wins / (len(id_scores) * len(ood_scores))

    def passing(scores, threshold):
        return sum(score >= threshold for score in scores)

    errors, accepted = [0.5], {}
    for threshold in {*id_scores, *ood_scores}:
        found, passed = passing(id_scores, threshold), passing(ood_scores, threshold)
        errors.append((1 - found / len(id_scores) + passed / len(ood_scores)) / 2)
        # All rates are hundredths, so that this is in integers.
        if 100 * found >= round(100 * tpr) * len(id_scores):
            accepted[threshold] = passed / len(ood_scores)
    assert detection_error(id_scores, ood_scores) == pytest.approx(min(errors), abs=1e-15)
    assert fpr_at_tpr(id_scores, ood_scores, tpr=tpr) == min(accepted.values())
    strictest = max(t for t in accepted if t in id_scores)
    assert threshold_at_tpr(id_scores, tpr=tpr) == strictest
    assert accepted[strictest] == min(accepted.values())


@given(tied, tied, rates)
def test_negating_both_sides_exchanges_the_classes(id_scores, ood_scores, tpr):
    swapped = np.negative(ood_scores), np.negative(id_scores)
    assert auroc(*swapped) == auroc(id_scores, ood_scores)
    assert aupr_in(*swapped) == aupr_out(id_scores, ood_scores)
    assert fpr_at_tpr(*swapped, tpr=tpr) == fpr_at_tpr(
        id_scores, ood_scores, tpr=tpr, positive="ood"
    )
    assert detection_error(*swapped) == detection_error(id_scores, ood_scores)


@given(tied, tied)
def test_equal_to_scikit_learn_with_ties(id_scores, ood_scores):
    labels, scores = labelled(id_scores, ood_scores)
    assert auroc(id_scores, ood_scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)
    assert aupr_in(id_scores, ood_scores) == pytest.approx(
        average_precision_score(labels, scores), abs=1e-14
    )
    assert aupr_out(id_scores, ood_scores) == pytest.approx(
        average_precision_score(1 - labels, -scores), abs=1e-14
    )


def test_equal_to_scikit_learn_at_scale():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(1, 1, 5000), rng.normal(0, 1, 1000)
    labels, scores = labelled(id_scores, ood_scores)
    assert auroc(id_scores, ood_scores) == pytest.approx(roc_auc_score(labels, scores), rel=1e-13)
    assert aupr_in(id_scores, ood_scores) == pytest.approx(
        average_precision_score(labels, scores), rel=1e-13
    )
    assert aupr_out(id_scores, ood_scores) == pytest.approx(
        average_precision_score(1 - labels, -scores), rel=1e-13
    )


@pytest.mark.parametrize(("tpr", "total"), [(0.95, 20), (0.07, 100), (0.29, 100), (0.58, 50)])
def test_a_rate_that_divides_evenly_asks_for_no_extra_positive(tpr, total):
    # tpr x total is an integer, though not always so in floating point.
    needed = round(tpr * total)
    assert threshold_at_tpr(np.arange(total), tpr=tpr) == total - needed
    assert fpr_at_tpr(np.arange(total), np.arange(total) - 0.5, tpr=tpr) == (needed - 1) / total


@pytest.mark.parametrize(("ood", "value"), [(0, 1.0), (1, 0.5), (2, 0.0)])
def test_one_against_one(ood, value):
    assert auroc([1], [ood]) == value
    assert aupr_in([1], [ood]) == (1.0 if ood < 1 else 0.5)
    assert fpr_at_tpr([1], [ood]) == fpr_at_tpr([1], [ood], positive="ood") == float(ood >= 1)
    assert threshold_at_tpr([1]) == 1.0
    estimate = evaluate_scores([1], [ood]).auroc
    assert dataclasses.astuple(estimate) == (value, 0.0, 1.0)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, bool, np.float16, np.float32, ml_dtypes.bfloat16]
)
def test_narrow_types_keep_their_ties(dtype):
    rng = np.random.default_rng(1)
    id_scores, ood_scores = (
        rng.integers(0, 9, 50).astype(dtype),
        rng.integers(0, 7, 40).astype(dtype),
    )
    wide = id_scores.astype(np.float64), ood_scores.astype(np.float64)
    assert evaluate_scores(id_scores, ood_scores, replicates=5) == evaluate_scores(
        *wide, replicates=5
    )


def test_float32_scores_one_ulp_apart_stay_apart():
    one = np.float32(1)
    assert auroc(np.array([np.nextafter(one, np.float32(2))]), np.array([one])) == 1.0


def delong_by_pairs(id_scores, ood_scores):
    """The definition: the covariance of the placement values over all pairs."""
    wins = np.heaviside(np.subtract.outer(id_scores, ood_scores), 0.5)
    variance = wins.mean(axis=1).var(ddof=1) / len(id_scores)
    variance += wins.mean(axis=0).var(ddof=1) / len(ood_scores)
    margin = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    return wins.mean() - margin, wins.mean() + margin


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_interval_of_auroc_is_delongs(decimals):
    rng = np.random.default_rng(2)
    id_scores = rng.normal(0.5, 1, 80).round(decimals)
    ood_scores = rng.normal(0, 1, 50).round(decimals)
    estimate = evaluate_scores(id_scores, ood_scores, replicates=1).auroc
    expected = delong_by_pairs(id_scores, ood_scores)
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)


def test_values_are_those_of_the_single_functions():
    rng = np.random.default_rng(3)
    sets = rng.normal(1, 1, 90).round(1), rng.normal(0, 1, 60).round(1)
    metrics = evaluate_scores(*sets, replicates=2)
    assert {name: estimate["value"] for name, estimate in dataclasses.asdict(metrics).items()} == {
        "auroc": auroc(*sets),
        "aupr_in": aupr_in(*sets),
        "aupr_out": aupr_out(*sets),
        "fpr_at_95_tpr_id_positive": fpr_at_tpr(*sets, positive="id"),
        "fpr_at_95_tpr_ood_positive": fpr_at_tpr(*sets, positive="ood"),
        "detection_error": detection_error(*sets),
    }


def test_intervals_depend_on_the_seed_alone_not_on_the_order():
    rng = np.random.default_rng(4)
    id_scores, ood_scores = rng.normal(1, 1, 70), rng.normal(0, 1, 30)
    metrics = evaluate_scores(id_scores, ood_scores, replicates=20)
    assert metrics == evaluate_scores(id_scores[::-1], np.sort(ood_scores), replicates=20)
    assert metrics != evaluate_scores(id_scores, ood_scores, replicates=20, seed=1)


def test_intervals_narrow_with_lower_confidence_and_vanish_without_overlap():
    rng = np.random.default_rng(5)
    sets = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    wide = dataclasses.asdict(evaluate_scores(*sets, confidence=0.99))
    narrow = dataclasses.asdict(evaluate_scores(*sets, confidence=0.5))
    for name in wide:
        assert wide[name]["low"] < narrow[name]["low"] < narrow[name]["high"] < wide[name]["high"]
    apart = evaluate_scores([5, 6, 7], [1, 2, 3])
    assert [dataclasses.astuple(e) for e in (apart.auroc, apart.aupr_in)] == [(1.0,) * 3] * 2
    assert dataclasses.astuple(apart.fpr_at_95_tpr_id_positive) == (0.0,) * 3


def test_intervals_are_about_their_values():
    # Few against many, so that no class may stand for the other.
    rng = np.random.default_rng(7)
    metrics = evaluate_scores(rng.normal(1, 1, 4000), rng.normal(0, 1, 1000))
    for estimate in vars(metrics).values():
        assert estimate.low < estimate.value < estimate.high < estimate.low + 0.15


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    # Normal scores one deviation apart: the AUROC is Phi(1 / sqrt 2), and so on in closed form; the
    # average precision is the mean of the precision at the score of a positive.
    normal = NormalDist()
    passing = [(normal.cdf(x), normal.cdf(x - 1)) for x in map(normal.inv_cdf, HUNDREDTHS)]
    precision = np.mean([found / (found + passed) for found, passed in passing])
    truth = {
        "aupr_in": precision,
        "aupr_out": precision,
        "auroc": normal.cdf(math.sqrt(0.5)),
        "fpr_at_95_tpr_id_positive": normal.cdf(normal.inv_cdf(0.95) - 1),
        "fpr_at_95_tpr_ood_positive": normal.cdf(normal.inv_cdf(0.95) - 1),
        "detection_error": normal.cdf(-0.5),
    }
    rng = np.random.default_rng(6)
    trials, covered = 100, dict.fromkeys(truth, 0)
    for _ in range(trials):
        sets = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
        metrics = dataclasses.asdict(evaluate_scores(*sets, confidence=0.8, replicates=400))
        for name, value in truth.items():
            covered[name] += metrics[name]["low"] <= value <= metrics[name]["high"]
    # Three standard deviations of a binomial about 80 %.
    assert all(68 <= count <= 92 for count in covered.values()), covered


@pytest.mark.parametrize(
    "metric", [auroc, aupr_in, aupr_out, fpr_at_tpr, detection_error, evaluate_scores]
)
@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([], [1.0], "id_scores is empty"),
        ([1.0], [], "ood_scores is empty"),
        ([[1.0]], [1.0], r"id_scores .* shape \(1, 1\)"),
        ([1.0], 1.0, r"ood_scores .* shape \(\)"),
        ([1.0, np.nan, np.inf], [1.0], r"id_scores .* 2 of 3 .* \[1, 2\]"),
        ([1.0], [-np.inf] * 9, r"ood_scores .* 9 of 9 .* \[0, 1, 2, 3, 4\] \.\.\."),
    ],
)
def test_bad_scores_are_named(metric, id_scores, ood_scores, message):
    with pytest.raises(ValueError, match=message):
        metric(id_scores, ood_scores)


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, np.nan])
def test_bad_rate(tpr):
    with pytest.raises(ValueError, match=f"tpr .* got {tpr}"):
        fpr_at_tpr([1.0], [0.0], tpr=tpr)
    with pytest.raises(ValueError, match=f"tpr .* got {tpr}"):
        threshold_at_tpr([1.0], tpr=tpr)


def test_bad_options():
    with pytest.raises(ValueError, match=r"positive .* 'in'"):
        fpr_at_tpr([1.0], [0.0], positive="in")
    with pytest.raises(ValueError, match=r"confidence .* got 95"):
        evaluate_scores([1.0], [0.0], confidence=95)
    with pytest.raises(ValueError, match=r"replicates .* got 0"):
        evaluate_scores([1.0], [0.0], replicates=0)


def test_metrics_are_printed_readably():
    metrics = evaluate_scores([5, 6, 7], [1, 2, 3])
    assert str(metrics.auroc) == "100.00% (100.00% to 100.00%)"
    lines = str(metrics).splitlines()
    assert lines[0] == "auroc                       100.00% (100.00% to 100.00%)"
    assert len(lines) == 6
