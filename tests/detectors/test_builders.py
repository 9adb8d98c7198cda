import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax import detectors, scores
from gradnorm_jax.detectors import DETECTORS, parse_detectors
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.statistics import Examples, class_sums, moments, tied_gaussians
from gradnorm_jax.types import Outputs, linear_head


def only(spec, **defaults):
    (detector,) = parse_detectors([spec], defaults)
    return detector


LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)


def examples_of(model, batch):
    """The last layer and the batch as training data."""
    outputs = map(np.asarray, batch.outputs)
    return linear_head(model), Examples(*outputs, LABELS, np.arange(6))


def test_the_papers_detectors_are_in_the_table():
    assert set(DETECTORS) >= {"msp", "odin", "mahalanobis", "energy", "gradnorm"}


def test_they_are_at_hand_after_a_bare_import():
    assert gj.detectors.mahalanobis() == only("mahalanobis")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (row.space == "inner"))
        for name, row in DETECTORS.items()
    ],
)
def test_every_detector_gives_a_score_per_image(name, model, batch):
    # There are six images.
    options = {
        "exgrad": "(sign=1)",
        "knn": "(k=2)",
        "nnguide": "(k=2)",
        "layer_gradients": "(select=head)",
        "gram": "(layers=1,held_out=0.5)",
        "gradient_projection": "(directions=3)",
        "rankfeat": "(layers=1)",
        **dict.fromkeys(("nac_layers", "mahalanobis_layers", "layer_features"), "(layers=1)"),
    }
    detector = only(name + options.get(name, ""))
    if name == "rankfeat":
        with pytest.raises(ValueError, match="give layers before positions are averaged"):
            detector.score(None, model, batch)
        return
    if detector.needs == "network":
        state = gj.fit(detector, model, (np.asarray(batch.images), LABELS)).state
    else:
        state = detector.fit and detector.fit.state(*examples_of(model, batch))
    values = detector.score(state, model, batch)
    assert values.shape == (6,)
    assert bool(jnp.isfinite(values).all())
    if detector.fit and detector.needs != "network":
        head, examples = examples_of(model, batch)
        refused = pytest.raises(ValueError, match="label")
        with refused if detector.fit.needs_labels else contextlib.nullcontext():
            detector.fit.state(head, examples._replace(labels=np.full(6, -1, np.int32)))


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        ("msp", "logits"),
        ("energy", "logits"),
        ("odin", "logits"),
        ("odin(epsilon=0.1)", "network"),
        ("mahalanobis", "outputs"),
        ("gradnorm", "outputs"),
        ("gradnorm(autodiff=true)", "network"),
        ("gradnorm(select=all)", "network"),
        ("residual_norm", "logits"),
        ("feature_hessian", "logits"),
        ("gradpca(aggregate=max)", "outputs"),
        ("grood(size=4)", "outputs"),
    ],
)
def test_what_each_needs_is_all_it_reads(spec, needs, model, batch):
    detector = only(spec)
    assert detector.needs == needs
    state = None
    if detector.fit:
        state = detector.fit.state(*examples_of(model, batch))
    if needs != "network":
        batch = batch._replace(images=None)
    if needs == "logits":
        batch = batch._replace(outputs=Outputs(None, batch.outputs.logits))
    assert detector.score(state, model, batch).shape == (6,)


def test_what_is_lacking_is_said(model, batch):
    with pytest.raises(ValueError, match=r"'gradnorm\(select=all\)' runs the network again"):
        only("gradnorm(select=all)").score(None, model, batch._replace(images=None))
    without = batch._replace(outputs=Outputs(None, batch.outputs.logits))
    with pytest.raises(ValueError, match=r"'gradnorm' needs features.*gradnorm_of_parameters"):
        only("gradnorm").score(None, model, without)


def test_options_reach_the_score(model, batch):
    features, logits = batch.outputs
    np.testing.assert_array_equal(
        only("gradnorm(temperature=2, ord=inf, include_bias=True)").score(None, model, batch),
        scores.gradnorm(features, logits, temperature=2, ord=math.inf, include_bias=True),
    )
    odin = only("odin(epsilon=0.1, temperature=10)")
    np.testing.assert_array_equal(
        odin.score(None, model, batch),
        scores.odin(lambda x: model(x).logits, batch.images, temperature=10, epsilon=0.1),
    )


def test_autodiff_agrees_with_the_closed_form(model, batch):
    np.testing.assert_allclose(
        only("gradnorm(autodiff=True, include_bias=True)").score(None, model, batch),
        only("gradnorm(include_bias=True)").score(None, model, batch),
        rtol=1e-6,
    )


@pytest.mark.parametrize("autodiff", [False, True])
def test_a_bias_that_the_head_lacks_cannot_be_included(autodiff, model, batch):
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, bias=None))
    with pytest.raises(ValueError, match="last layer has no bias"):
        detectors.gradnorm(include_bias=True, autodiff=autodiff).score(None, model, batch)


@pytest.mark.parametrize("ord", ["1", "2", "inf"])
def test_any_parameters_can_be_selected(ord, model, batch):
    def of(select):
        return only(f"gradnorm(select={select}, ord={ord})").score(None, model, batch)

    with_bias = only(f"gradnorm(include_bias=True, ord={ord})").score(None, model, batch)
    kernel_alone = only(f"gradnorm(ord={ord})").score(None, model, batch)
    np.testing.assert_allclose(of("head"), with_bias, rtol=1e-5)
    np.testing.assert_allclose(of("[head/kernel, head/bias]"), with_bias, rtol=1e-5)
    np.testing.assert_allclose(of("*/kernel"), kernel_alone, rtol=1e-5)
    everything = scores.gradnorm_of_parameters(model, batch.images, ord=float(ord))
    np.testing.assert_allclose(of("all"), everything, rtol=1e-6)
    gradients = jax.vmap(
        jax.grad(lambda p, x: kl_to_uniform(model.apply(p, x[None]).logits)[0]), (None, 0)
    )(model.params, batch.images)
    flat = jnp.concatenate([g.reshape(6, -1) for g in jax.tree.leaves(gradients)], axis=1)
    np.testing.assert_allclose(everything, jnp.linalg.norm(flat, float(ord), axis=1), rtol=1e-5)


def test_mahalanobis_is_fitted_to_features_and_labels(model, batch):
    detector = only("mahalanobis")
    features, labels = batch.outputs.features, LABELS
    expected = tied_gaussians(moments(features), class_sums(features, labels, 3))
    np.testing.assert_allclose(
        detector.score(detector.fit.state(*examples_of(model, batch)), model, batch),
        scores.mahalanobis(features, expected),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("build", "options", "name"),
    [
        (detectors.msp, {}, "msp"),
        (detectors.gradnorm, {"ord": 1}, "gradnorm"),
        (detectors.gradnorm, {"ord": 2}, "gradnorm(ord=2)"),
        (detectors.gradnorm, {"ord": math.inf, "temperature": 0.5}, None),
        (detectors.gradnorm, {"include_bias": True}, "gradnorm(include_bias=True)"),
        (detectors.gradnorm, {"select": "block4/*"}, "gradnorm(select=block4/*)"),
        (detectors.gradnorm, {"select": ["a", "b"]}, "gradnorm(select=[a,b])"),
        (detectors.gradnorm, {"select": "a,b"}, "gradnorm(select='a,b')"),
        (detectors.odin, {"epsilon": np.float32(0.5)}, "odin(epsilon=0.5)"),
        (detectors.odin, {"epsilon": 1e-5}, "odin(epsilon=1e-05)"),
    ],
)
def test_the_name_says_what_is_not_the_default(build, options, name):
    detector = build(**options)
    assert detector.name == name or name is None
    assert detector == only(detector.name)
    assert hash(detector) == hash(only(detector.name))


def test_the_order_of_options_is_of_no_account():
    one, other = {"ord": 2, "temperature": 3}, {"temperature": 3.0, "ord": 2.0}
    assert detectors.gradnorm(**one) == detectors.gradnorm(**other)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (detectors.odin, {"epsilon": "foo"}, "option epsilon of odin takes a number, got 'foo'"),
        (detectors.odin, {"epsilon": None}, "takes a number, got None"),
        (detectors.odin, {"epsilon": True}, "takes a number, got True"),
        (detectors.odin, {"epsilon": math.nan}, "takes a number, got nan"),
        (detectors.odin, {"epsilon": 10**400}, "takes a number, got 1000"),
        (detectors.odin, {"epsilon": -0.1}, "epsilon must be finite and not negative, got -0.1"),
        (detectors.odin, {"epsilon": math.inf}, "epsilon must be finite and not negative"),
        (detectors.gradnorm, {"include_bias": "false"}, "takes true or false, got 'false'"),
        (detectors.gradnorm, {"include_bias": 2}, "takes true or false, got 2"),
        (detectors.gradnorm, {"include_bias": None}, "takes true or false, got None"),
        (detectors.gradnorm, {"select": 1}, "takes a text or a list, each a text or None, got 1"),
        (detectors.gradnorm, {"select": ["a", 1]}, "option select of gradnorm takes"),
        (detectors.gradnorm, {"select": {"a": 1}}, "option select of gradnorm takes"),
        (detectors.msp, {"temperature": [1]}, r"takes a number, got \[1\]"),
        (detectors.msp, {"temperature": 0}, "temperature must be positive"),
    ],
)
def test_options_of_the_wrong_type_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_traced_option_is_refused():
    with pytest.raises(ValueError, match="temperature of msp takes a number"):
        jax.jit(lambda t: detectors.msp(temperature=t).options[0][1])(1.0)
