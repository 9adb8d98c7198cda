"""Detectors that look inside the network, against a loop over images without the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gradnorm_jax as gj
from gradnorm_jax.detectors import DETECTORS, Batch, parse_detectors
from gradnorm_jax.evaluation.in_memory import fit_states
from tests.detectors import inner_reference as reference
from tests.detectors.inner_reference import SCORES, make_images, make_params, network

LABELS = np.arange(40) % reference.CLASSES


def model_of(dtype):
    params = make_params(dtype)
    return gj.from_apply(network, params, make_images(2, dtype))


@functools.partial(jax.jit, static_argnames="detectors")
def score_all(model, states, images, detectors):
    batch = Batch(images, model(images))
    return {d.name: d.score(states.get(d.name), model, batch) for d in detectors}


def fit_and_score(specs, dtype, batch_size=16, test=12):
    model, train = model_of(dtype), make_images(40, dtype)
    detectors = parse_detectors(specs)
    fitted = [d for d in detectors if d.fit]
    states = fit_states(
        model, (np.asarray(train), LABELS), fitted, batch_size=batch_size, progress=False
    )
    return score_all(model, states, make_images(test, dtype, seed=2, scale=1.5), detectors)


def test_every_detector_of_inner_layers_has_its_loop_here():
    named = {term.partition("(")[0] for spec in SCORES for term in spec.split("+")}
    inner = {name for name, row in DETECTORS.items() if row.space == "inner" and not row.example}
    assert named >= inner - {"layer_features"}


@pytest.mark.slow
def test_all_equal_their_formulas(x64):
    found = fit_and_score(SCORES, jnp.float64)
    loop = reference.Loop(make_params(jnp.float64), make_images(40, jnp.float64), LABELS)
    for spec, formula in SCORES.items():
        expected = [formula(loop, image) for image in make_images(12, jnp.float64, 2, 1.5)]
        # What a bank keeps is in float32, and so are the fractions of GAIA-Z.
        in_float32 = any(name in spec for name in ("mahalanobis", "knn", "gaia_z"))
        rtol = 1e-6 if in_float32 else 1e-8
        np.testing.assert_allclose(found[spec], expected, rtol=rtol, err_msg=spec)


@pytest.mark.slow
def test_neither_batches_nor_neighbours_nor_precision_matter():
    """Fitted in other batches to images in float32, and for an image alone."""
    alone = fit_and_score(SCORES, jnp.float32, batch_size=24, test=1)
    with jax.enable_x64(True):
        together = fit_and_score(SCORES, jnp.float64)
    for spec, found in alone.items():
        # A density of logarithms is steep, and so are distances between points close together:
        # they have the errors of norms many times.
        rtol = 1e-4 if "layer_norms" in spec else 1e-5
        np.testing.assert_allclose(found[0], together[spec][0], rtol=rtol, err_msg=spec)


@pytest.mark.slow
def test_detectors_behind_a_reading():
    model, images = model_of(jnp.float32), make_images(12, jnp.float32)
    mean = gj.Reading("mean", lambda state, model, batch: batch.images.mean(axis=(1, 2)))
    fitted = gj.fit(gj.compose(mean, gj.detectors.gaussian()), model, images)
    rows = np.asarray(images.mean(axis=(1, 2)), np.float64)
    expected = stats.norm.logpdf(rows, rows.mean(axis=0), rows.std(axis=0)).sum(axis=1)
    np.testing.assert_allclose(fitted.score(images), expected, rtol=1e-5)
    # The gradient of the logits' sum by the kernel is the features, once for each class.
    deep, last = (
        gj.fit(spec, model, (images, LABELS[:12])).score(images)
        for spec in ("layer_gradients(select=head/kernel)+gradpca", "gradpca")
    )
    np.testing.assert_allclose(deep, last, rtol=1e-5)
    with pytest.raises(ValueError, match=r"energy does not look at features, whose place layer_no"):
        parse_detectors(["layer_norms+energy"])
    with pytest.raises(ValueError, match="runs the network again"):
        parse_detectors(["react+gaia_z"])


def test_what_cannot_be_had_is_refused():
    def smooth(params, images):
        return jnp.tanh(images.mean(axis=(1, 2)) @ params["body"]) @ params["head"]

    rng = np.random.default_rng(0)
    params = {"body": rng.normal(size=(3, 4)), "head": rng.normal(size=(4, 3))}
    params = jax.tree.map(jnp.float32, params)
    images = make_images(4, jnp.float32)
    model = gj.from_apply(smooth, params, images)
    with pytest.raises(ValueError, match="a network without rectifiers has none: take gaia_a"):
        gj.scores.gaia_z(model, images)
    with pytest.raises(ValueError, match="last 4 parts of the network are asked for, and it has 1"):
        gj.scores.layer_features(model, images)
    with pytest.raises(ValueError, match="1 values of steepness are given for 2 layers"):
        gj.scores.neuron_states(model_of(jnp.float32), images, 2, [1.0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adascale_a(low=90)", "percentiles must be 0 <= low <= high < 100, got 90.0 and 85.0"),
        ("adascale_l(k_shift=2)", r"k_shift is a fraction, from 0 to below 1, got 2.0"),
        ("pro(steps=0)", "steps must be a whole number, at least 1, got 0"),
        ("nac_layers(bins=3)", "bins must be at least 4, got 3"),
        ("mahalanobis_layers(layers=0)", "layers must be a whole number, at least 1, got 0"),
        ("mahalanobis_layers(magnitude=-1)", "epsilon must be finite and not negative, got -1.0"),
        ("odin(epsilon=1,input_std=[1,0])", r"input_std must be positive, got \(1.0, 0.0\)"),
        ("layer_norms(ord=0)", "ord must be at least 0.5"),
        ("layer_gradients", "needs its option select"),
    ],
)
def test_options_out_of_range_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_detectors([spec])
