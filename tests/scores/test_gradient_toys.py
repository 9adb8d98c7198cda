"""Scores of the gradient space on numbers that can be worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import scores
from gradnorm_jax.statistics import Examples, class_sums, learn, moments
from gradnorm_jax.statistics.average_gradients import average_gradients, gradient_sums
from gradnorm_jax.statistics.cells import CELLS, cell_subspace
from gradnorm_jax.statistics.directions import (
    leading_directions,
    posterior_root,
    principal_subspace,
    unit_leverage,
)
from gradnorm_jax.statistics.neuron_counts import neuron_counts, neuron_coverage, state_edges
from gradnorm_jax.statistics.output_fisher import OUTPUT_FISHER, head_fisher
from gradnorm_jax.types import LinearHead

# h = (1, -2) and p = (3/4, 1/4): |h|_1 = 3, |h|_2^2 = 5, sum p (1 - p) = 3/8, |p - u|_2^2 = 1/8
FEATURES, LOGITS = np.array([[1.0, -2.0]]), np.log([[3.0, 1.0]])


def examples(features, logits, labels):
    return Examples(
        np.asarray(features, float), np.asarray(logits, float), np.array(labels), np.arange(9)
    )


def learned(statistic, head, *data):
    return learn([statistic], head, [examples(*data)])[statistic]


def assert_scores(actual, *expected, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=atol)


def test_without_a_fit():
    assert_scores(scores.gini(LOGITS), -3 / 8)
    assert_scores(scores.exgrad(FEATURES, LOGITS, sign=1), 3)
    assert_scores(scores.exgrad(FEATURES, LOGITS, sign=-1, include_bias=False), -9 / 4)
    assert_scores(scores.fisher_trace(FEATURES, LOGITS), -9 / 4)
    assert_scores(scores.fisher_trace(FEATURES, LOGITS, include_bias=False), -15 / 8)
    assert_scores(scores.grad_uncertainty(FEATURES, LOGITS), 3)
    # Weights 2 and 0 with these probabilities: a variance of 4 p (1 - p).
    assert_scores(scores.feature_hessian_trace(LOGITS, [[2.0, 0.0]]), -3 / 4)


@pytest.mark.parametrize("margin", [5.0, 15.0, 40.0])
def test_confident_predictions_keep_their_digits(margin):
    rest = 1 / (1 + math.exp(margin))
    variance = rest / (1 + math.exp(-margin))
    logits = np.array([[0.0, margin]])
    assert_scores(scores.gini(logits), -2 * variance, atol=0)
    assert_scores(scores.feature_hessian_trace(logits, [[101.0, 99.0]]), -4 * variance, atol=0)


def test_gradorth():
    basis = leading_directions(moments([[3.0, 0.0], [-3.0, 0.1]]))
    assert basis.shape == (2, 1)
    assert_scores(scores.gradorth(FEATURES, LOGITS, [[1.0], [0.0]]), math.sqrt(1 / 8))
    assert leading_directions(moments([[3.0, 0.0], [-3.0, 0.1]]), 1.0).shape == (2, 2)


def test_gradorth_ranks_rectified_features_nearly_as_gradnorm_does():
    # Which is why we say so: most of such a feature lies in the subspace.
    rng = np.random.default_rng(0)
    features = np.maximum(rng.normal(size=(500, 64)) + 0.5, 0) * rng.uniform(0.5, 2, (500, 1))
    logits = features @ rng.normal(size=(64, 10)) / 4
    pair = (
        scores.gradorth(features, logits, leading_directions(moments(features[:250]))),
        scores.gradnorm(features, logits, ord=2),
    )
    ranks = [np.argsort(np.argsort(np.asarray(each)[250:])) for each in pair]
    assert np.corrcoef(*ranks)[0, 1] > 0.99


def test_gradpca_of_the_sum():
    subspace = principal_subspace(class_sums([[1.0, 0.0], [-1.0, 0.0]], [0, 1], 3))
    assert_scores(scores.gradpca([[3.0, 4.0], [-2.0, 0.0], [0.0, 0.0]], subspace), 0.36, 1, 1)


def test_gradpca_of_the_largest_logit():
    # Mean gradients (1, 1) in either class's own column; they differ by +-(1, 1) in both.
    head = LinearHead(np.zeros((1, 2)), np.zeros(2))
    cells = learned(CELLS, head, [[1.0], [0.5], [1.5]], [[1, 0], [0, 1], [0, 1]], [0, 1, 1])
    np.testing.assert_array_equal(cells.pairs, [[0, 0], [1, 1]])
    np.testing.assert_array_equal(cells.sums, [[1, 1], [2, 2]])
    subspace = cell_subspace(cells)
    assert subspace.offset.shape == (1,)
    # (-1, 1) - (1/2, 1/2) in one column and -(1/2, 1/2) in the other are orthogonal to that.
    assert_scores(
        scores.gradpca_max([[1.0], [1.0], [-1.0]], [[1, 0], [0, 1], [1, 0]], subspace), 1, 1, 0
    )


def test_average_gradient():
    head = LinearHead(np.zeros((2, 2)), np.zeros(2))
    sums = learned(gradient_sums(), head, [[2.0, 0.0]], [[3.0, 0.0]], [1])
    gradients = average_gradients(sums)
    features, logits = [[5.0, 0.0], [0.0, 5.0], [3.0, 4.0], [0.0, 0.0]], [[3.0, 0.0]] * 4
    assert_scores(scores.average_gradient(features, logits, gradients), 1, 0, 0.6, 0)


def test_fisher_mahalanobis():
    # A = 1; p = (1/2, 1/2): B has eigenvalue 1/2 along (1, -1), and |p - e_y|^2 is 1/2.
    head = LinearHead(np.zeros((1, 2)), np.zeros(2))
    output = learned(OUTPUT_FISHER, head, [[1.0], [-1.0]], [[0, 0], [7, 7]], [0, 0])
    fisher = head_fisher(moments([[1.0], [-1.0]]), output, damping=1e-9, include_bias=False)
    assert_scores(scores.fisher_mahalanobis([[2.0]], [[0.0, 0.0]], fisher), -4)


def test_scod():
    # What the data determine has no variance; what they do not has the prior's, for both classes.
    root = posterior_root(moments([[1e6, 0.0]]), 2, prior_std=3.0, include_bias=False)
    assert_scores(scores.scod([[1.0, 0.0], [0.0, 1.0]], root), 0, -18)


def test_pnml():
    # Of (1, 0, 1), (0, 1, 1) has 3/2 outside, and (1, 0, 1) itself leverage 1, so kappa 1/2.
    leverage = unit_leverage(moments([[1.0, 0.0]]))
    expected = [-math.log2(2 / (1 + 0.5**kappa)) for kappa in (1.5, 0.5)]
    kernel, bias = np.zeros((2, 2)), np.zeros(2)
    assert_scores(scores.pnml([[0.0, 7.0], [7.0, 0.0]], kernel, bias, leverage), *expected)


def test_nac():
    # h dKL/dh is the same for h = 1 and -1, and zero for 0.
    head = LinearHead(np.array([[1.0, -1.0]]), np.zeros(2))
    counts = learned(neuron_counts(50, 3.0), head, [[1.0]], [[1.0, -1.0]], [0])
    coverage = neuron_coverage(counts)
    features = np.array([[1.0], [-1.0], [0.0]])
    assert_scores(scores.nac(features, features @ head.kernel, head.kernel, coverage), 1, 1, 0)


def test_states_of_zero_features_start_a_bin_in_any_precision():
    for bins in (4, 8, 50):
        edges = state_edges(bins)
        assert len(edges) == 2 * (bins // 2) - 1
        assert (np.diff(edges) > 0).all()
        assert 0.5 in edges
        assert 0.5 in edges.astype(np.float32)
        np.testing.assert_allclose(edges[:-1] + edges[:0:-1], [1.01] + [1] * (len(edges) - 2))


def test_grood():
    # Distances of 2 and 3: the foreign prototype has probability 1 / (1 + e).
    prototypes = scores.Prototypes(jnp.array([[1.0, 0.0]]), jnp.zeros(2))
    bank = scores.GroodBank(prototypes, jnp.array([[0.0, 9.0], [0.0, 0.0]]))
    assert_scores(scores.grood([[3.0, 0.0], [0.0, 0.0]], bank), -1 / (1 + math.e) ** 2, 0)


def test_gsc():
    # The first feature decides z = (4, 1); without it both are 1.
    kernel = [[3.0, 0.0], [1.0, 1.0]]
    features, logits = [[1.0, 1.0]], [[4.0, 1.0]]
    assert_scores(scores.gsc(features, logits, kernel, fraction=0.5), 1 + math.log(2))
    assert_scores(scores.gsc(features, logits, kernel, fraction=0), scores.energy(logits)[0])
    assert_scores(scores.gsc(features, logits, kernel, fraction=1), math.log(2))
