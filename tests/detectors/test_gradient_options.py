"""Options of the detectors of the gradient space, and training images that do not serve."""

import numpy as np
import pytest

from gradnorm_jax import detectors, scores
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.statistics import class_sums
from gradnorm_jax.statistics.prototypes import prototypes
from tests.last_layers import random_examples, random_head, score


def fit(spec, head, train):
    (detector,) = parse_detectors([spec])
    return detector.fit.state(head, train)


def test_exgrad_must_be_given_a_sign():
    with pytest.raises(ValueError, match=r"'exgrad' needs its option sign"):
        parse_detectors(["exgrad"])
    with pytest.raises(ValueError, match=r"option sign of exgrad takes 1 or -1, got 0"):
        parse_detectors(["exgrad(sign=0)"])
    with pytest.raises(ValueError, match=r"sign must be 1 or -1, got 2"):
        scores.exgrad(np.ones((1, 2)), np.ones((1, 2)), sign=2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gradorth(share=0)", r"share must lie in \(0, 1\], got 0"),
        ("gradpca(share=1.5)", r"share must lie in \(0, 1\], got 1.5"),
        ("gradpca(aggregate=mean)", "takes 'sum' or 'max', got mean"),
        ("average_gradient(rank=0)", "rank must be at least 1, got 0"),
        ("fisher_mahalanobis(damping=0)", "damping must be positive, got 0"),
        ("scod(rank=-1)", "rank must not be negative, got -1"),
        ("scod(prior_std=0)", "prior_std must be positive, got 0"),
        ("nac(bins=3)", "bins must be at least 4, got 3"),
        ("nac(steepness=0)", "steepness must be positive, got 0"),
        ("nac(usual=0)", r"usual must lie in \(0, 1\], got 0"),
        ("gsc(fraction=2)", r"fraction must lie in \[0, 1\], got 2"),
        ("grood(size=0)", "size must be a whole number, at least 1, got 0"),
        ("grood(foreign=no.npy)", r"cannot read features from no\.npy"),
        ("exgrad(sign=1,temperature=0)", "temperature must be positive"),
        ("feature_norm(ord=0)", "ord must be at least 0.5"),
    ],
)
def test_options_out_of_range_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_detectors([spec])


def test_equal_options_make_equal_detectors():
    for spec in ("scod(rank=3)", "gradpca(aggregate=max)", "grood", "nac(bins=8)"):
        assert parse_detectors([spec]) == parse_detectors([spec])
    assert detectors.gradpca(share=0.9) != detectors.gradpca()


@pytest.mark.parametrize("spec", ["gradpca", "gradpca(aggregate=max)", "average_gradient", "grood"])
def test_labels_are_needed(spec):
    head = random_head()
    train = random_examples(head, labels=np.full(60, -1))
    with pytest.raises(ValueError, match=r"60 training images have labels outside of 0\.\.3"):
        fit(spec, head, train)


def test_training_images_that_teach_nothing():
    head = random_head()
    train = random_examples(head)
    same = train._replace(features=np.zeros_like(train.features))
    for spec in ("gradorth", "gradpca"):
        with pytest.raises(ValueError, match="do not vary"):
            fit(spec, head, same)
    with pytest.raises(ValueError, match="none of 60 training images is predicted as it is label"):
        fit("grood", head, train._replace(labels=(train.logits.argmax(axis=1) + 1) % 4))


def test_foreign_features_come_from_a_file_alone(tmp_path):
    head = random_head()
    train, test = random_examples(head), random_examples(head, 8, seed=2)
    foreign = np.random.default_rng(0).normal(size=(5, 6))
    path = tmp_path / "foreign.npy"
    np.save(path, foreign)
    state = fit(f"grood(foreign={path})", head, train)
    expected = prototypes(class_sums(train.features, train.labels, 4), foreign)
    np.testing.assert_array_equal(state.prototypes.foreign, expected.foreign)
    np.testing.assert_allclose(state.prototypes.foreign, foreign.mean(axis=0), rtol=1e-6)
    (values,) = score([f"grood(foreign={path})"], head, train, test.features).values()
    np.testing.assert_allclose(values, scores.grood(test.features, state), rtol=1e-5)
    np.save(path, foreign[:, 1:])
    with pytest.raises(ValueError, match=r"must be \[N, 6\].* got shape \(5, 5\)"):
        fit(f"grood(foreign={path})", head, train)
