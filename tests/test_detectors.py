import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import scores
from gradnorm_jax.detectors import DETECTORS, Batch, parse_detectors
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.types import Head, Model, Outputs


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    params = {
        "body": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32),
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
        },
    }

    def apply(params, images):
        features = jax.nn.relu(images @ params["body"])
        return Outputs(features, features @ params["head"]["kernel"] + params["head"]["bias"][None])

    return Model(jax.tree_util.Partial(apply), params, Head(("head", "kernel"), ("head", "bias")))


@pytest.fixture
def batch(model):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32)
    return Batch(images, model(images))


def only(spec, **defaults):
    (detector,) = parse_detectors([spec], defaults)
    return detector


def test_the_papers_detectors_are_in_the_table():
    assert set(DETECTORS) >= {"msp", "odin", "mahalanobis", "energy", "gradnorm"}


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "mahalanobis"])
def test_every_detector_gives_a_score_per_image(name, model, batch):
    values = only(name).score(None, model, batch)
    assert values.shape == (6,)
    assert bool(jnp.isfinite(values).all())


def test_detectors_of_outputs_do_not_touch_the_images(model, batch):
    for name in DETECTORS:
        detector = only(name)
        if detector.needs == "outputs" and not detector.fit:
            detector.score(None, model, batch._replace(images=None))


def test_options_reach_the_score(model, batch):
    features, logits = batch.outputs
    np.testing.assert_array_equal(
        only("gradnorm(temperature=2, ord=inf, include_bias=True)").score(None, model, batch),
        scores.gradnorm(features, logits, temperature=2, ord=float("inf"), include_bias=True),
    )
    odin = only("odin(epsilon=0.1, temperature=10)")
    assert odin.needs == "network"
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


@pytest.mark.parametrize("ord", ["1", "2", "inf"])
def test_any_parameters_can_be_selected(ord, model, batch):
    def of(select):
        return only(f"gradnorm(select={select}, ord={ord})").score(None, model, batch)

    with_bias = only(f"gradnorm(include_bias=True, ord={ord})").score(None, model, batch)
    kernel_alone = only(f"gradnorm(ord={ord})").score(None, model, batch)
    np.testing.assert_allclose(of("head"), with_bias, rtol=1e-5)
    np.testing.assert_allclose(of("head/kernel"), kernel_alone, rtol=1e-5)
    everything = scores.gradnorm_of_parameters(model, batch.images, ord=float(ord))
    np.testing.assert_allclose(of("all"), everything, rtol=1e-6)
    gradients = jax.vmap(
        jax.grad(lambda p, x: kl_to_uniform(model.apply(p, x[None]).logits)[0]), (None, 0)
    )(model.params, batch.images)
    flat = jnp.concatenate([g.reshape(6, -1) for g in jax.tree.leaves(gradients)], axis=1)
    np.testing.assert_allclose(everything, jnp.linalg.norm(flat, float(ord), axis=1), rtol=1e-5)


def test_mahalanobis_is_fitted_by_addition(model, batch):
    detector = only("mahalanobis")
    labels = np.array([0, 1, 2, 0, 1, 2])
    halves = [
        detector.fit.update(Outputs(*(np.asarray(x[half]) for x in batch.outputs)), labels[half])
        for half in (slice(0, 2), slice(2, 6))
    ]
    state = detector.fit.finalize(jax.tree.map(np.add, *halves))
    values = detector.score(state, model, batch)
    expected = scores.mahalanobis(
        batch.outputs.features,
        scores.tied_gaussians(scores.class_moments(batch.outputs.features, labels, 3)),
    )
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_defaults_yield_to_options():
    default = {"gradnorm": {"temperature": 0.0}}
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        parse_detectors(["gradnorm"], default)
    parse_detectors(["gradnorm(temperature=1)", "msp"], default)


def test_names_are_the_specs():
    names = [d.name for d in parse_detectors(["gradnorm", "gradnorm( ord = 2 )"])]
    assert names == ["gradnorm", "gradnorm(ord=2)"]


def test_a_detector_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        only("msp").name = "other"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nonsense"], "unknown detector 'nonsense'; known: msp"),
        (["msp(ord=2)"], "'msp' has no option 'ord'; it has: temperature"),
        (["mahalanobis(x=2)"], "has no option 'x'; it has: none"),
        (["gradnorm(temperature=0)"], "temperature must be positive"),
        (["gradnorm(ord=0.1)"], "ord must be at least 0.5"),
        (["gradnorm(temperature=hot)"], "wrong type"),
        (["gradnorm(select=head, autodiff=True)"], "select chooses the parameters"),
        (["gradnorm(2)"], "write NAME or NAME"),
        (["gradnorm("], "write NAME or NAME"),
        (["msp", "msp"], "'msp' is asked for more than once"),
        ([], "no detectors are asked for"),
    ],
)
def test_bad_specs(specs, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_detectors(specs)
