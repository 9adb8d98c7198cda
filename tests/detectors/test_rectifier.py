import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax import detectors, scores
from gradnorm_jax.detectors import Rectifier, compose, parse_detectors
from gradnorm_jax.detectors.parse import split_terms
from gradnorm_jax.types import linear_head


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("msp", ["msp"]),
        ("react+energy", ["react", "energy"]),
        ("react(quantile=0.9) + msp", ["react(quantile=0.9) ", " msp"]),
        ("a(x='b+c', y=[1e+5]) + d", ["a(x='b+c', y=[1e+5]) ", " d"]),
        ("react+", ["react", ""]),
    ],
)
def test_terms_are_told_apart(spec, terms):
    assert split_terms(spec) == terms


def test_text_and_functions_give_the_same_detector():
    (found,) = parse_detectors(["ash_s+gradnorm(ord=2)"])
    assert found == compose(detectors.ash_s(), detectors.gradnorm(ord=2))
    assert found.name == "ash_s+gradnorm(ord=2)"
    assert found.needs == "outputs"
    (fitted,) = parse_detectors(["react(quantile=0.95)+mahalanobis"])
    assert fitted == compose(detectors.react(quantile=0.95), detectors.mahalanobis())
    assert hash(fitted) == hash(compose(detectors.react(quantile=0.95), detectors.mahalanobis()))


def test_alone_it_is_its_papers_detector(model, batch):
    by_name, by_value = parse_detectors(["ash_b", detectors.scale()])
    assert (by_name.name, by_value.name) == ("ash_b", "scale")
    (expected,) = parse_detectors(["ash_b+energy"])
    np.testing.assert_array_equal(
        by_name.score(None, model, batch), expected.score(None, model, batch)
    )


def test_the_logits_are_those_of_the_rectified_features(model, batch):
    (detector,) = parse_detectors(["react(threshold=0.5)+gradnorm"])
    clipped = np.minimum(batch.outputs.features, 0.5)
    kernel, bias = linear_head(model)
    np.testing.assert_allclose(
        detector.score(None, model, batch),
        scores.gradnorm(clipped, clipped @ kernel + bias[None]),
        rtol=1e-5,
    )


def test_a_rectifier_of_ones_own(model, batch):
    def double(state, head, outputs):
        return scores.outputs_of(2 * outputs.features, *head)

    detector = compose(Rectifier("double", double), detectors.max_logit())
    assert detector.name == "double+max_logit"
    kernel, bias = linear_head(model)
    expected = (2 * batch.outputs.features @ kernel + bias[None]).max(axis=1)
    np.testing.assert_allclose(detector.score(None, model, batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("react+odin(epsilon=0.1)", "runs the network again, which react does not reach"),
        ("dice+react", "react computes the logits anew, and so undoes dice"),
        ("msp+energy", "'msp' in 'msp\\+energy' is a detector, behind which nothing can come"),
        ("react+", "cannot read detector ''"),
        ("react(quantile=1.5)", r"quantile is a fraction, from 0 to below 1, got 1.5"),
        ("ash_s(sparsity=1)", r"sparsity is a fraction"),
        ("vra(lower=1)", "give both or neither"),
        ("vra(lower=2, upper=1)", "must not exceed the upper"),
        ("knn(k=10, bank_size=5)", "k=10 neighbours need a bank"),
    ],
)
def test_what_cannot_be_composed_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_detectors([spec])


def test_hand_computed_features():
    features = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(scores.react(features, 2.5), [[1, 2, 2.5, 2.5]])
    np.testing.assert_allclose(scores.vra(features, 1.5, 3.5), [[0, 2, 3, 3.5]])
    np.testing.assert_allclose(scores.vra(features, 1.5, 3.5, gamma=0.25), [[0, 2.25, 3.25, 3.5]])
    np.testing.assert_allclose(scores.ash_p(features, sparsity=0.5), [[0, 0, 3, 4]])
    np.testing.assert_allclose(scores.ash_b(features, sparsity=0.5), [[0, 0, 5, 5]])
    factor = np.exp(10 / 7)
    pruned = [[0, 0, 3 * factor, 4 * factor]]
    np.testing.assert_allclose(scores.ash_s(features, sparsity=0.5), pruned, rtol=1e-6)
    np.testing.assert_allclose(scores.scale(features, sparsity=0.5), features * factor, rtol=1e-6)
    np.testing.assert_allclose(
        scores.optfs(features, jnp.array([10.0, 20.0]), 1.0, 4.0), [[10, 20, 60, 0]]
    )


def test_a_run_is_described_by_all_options(model, batch, tmp_path):
    inputs = np.asarray(batch.images)
    run = {"batch_size": 6, "progress": False, "out": tmp_path / "run"}
    first = compose(detectors.react(threshold=0.5), detectors.msp())
    gj.evaluate(model, inputs, {"far": 3 * inputs}, detectors=[first], **run)
    other = compose(detectors.react(threshold=0.6), detectors.msp())
    other = gj.Detector(first.name, "outputs", other.score_fn, other.fit, other.options)
    with pytest.raises(FileExistsError, match=r"rectifier\.options\.threshold is '0\.5' there"):
        gj.evaluate(model, inputs, {"far": 3 * inputs}, detectors=[other], **run)


def test_statistics_are_of_rectified_features_in_a_run_too(model, batch):
    inputs, labels = np.asarray(jnp.tile(batch.images, (5, 1))), np.arange(30) % 3
    inputs = inputs + 0.1 * np.random.default_rng(0).normal(size=inputs.shape).astype(np.float32)
    fitted = gj.fit("react(threshold=0.5)+vim", model, (inputs, labels), batch_size=8)
    clipped = scores.outputs_of(scores.react(model(inputs).features, 0.5), *linear_head(model))
    identity = gj.from_apply(
        lambda params, h: h @ params["kernel"] + params["bias"][None],
        linear_head(model)._asdict(),
        np.zeros((2, 8), np.float32),
    )
    expected = gj.fit("vim", identity, (np.asarray(clipped.features), labels), batch_size=30)
    np.testing.assert_allclose(
        jax.jit(gj.Fitted.score)(fitted, inputs),
        jax.jit(gj.Fitted.score)(expected, clipped.features),
        rtol=1e-3,
        atol=1e-3,
    )
