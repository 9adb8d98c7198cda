import jax
import numpy as np
import pytest

import gradnorm_jax as gj
from tests.evaluation import networks

HELD_OUT, NEW = networks.inputs(99, seed=1), networks.inputs(20, seed=2)


@pytest.fixture(scope="module")
def model():
    return networks.build()


def test_decisions_by_hand(model):
    calibrated = gj.calibrate("energy", model, HELD_OUT, batch_size=32)
    held_out, scores = (np.asarray(gj.energy(model(x).logits)) for x in (HELD_OUT, NEW))
    p_values = [(1 + sum(held_out <= s)) / 100 for s in scores]
    threshold = np.sort(held_out)[4]
    np.testing.assert_allclose(calibrated.threshold, threshold, rtol=1e-6)
    decision = jax.jit(gj.Calibrated.decide)(calibrated, NEW)
    np.testing.assert_allclose(decision.score, scores, rtol=1e-5)
    np.testing.assert_allclose(decision.p_value, p_values, atol=0.0101)
    np.testing.assert_array_equal(decision.is_ood, scores < threshold)
    np.testing.assert_array_equal(decision.prediction, model(NEW).logits.argmax(axis=1))
    for name in ("score", "p_value", "is_ood"):
        alone = getattr(calibrated, name)(NEW)
        np.testing.assert_allclose(alone, getattr(decision, name), rtol=1e-5, atol=0.0101)
    assert calibrated.tpr_interval.low == gj.calibration.tpr_interval(95, 99).low
    assert calibrated.judge(np.array([np.nan], np.float32))[1].all()


def test_classes_are_numbered_as_labels_are(model, tmp_path):
    calibrated = gj.calibrate("energy", model, HELD_OUT, label_offset=1)
    gj.save_detector(calibrated, tmp_path / "d.safetensors")
    loaded = gj.load_detector(tmp_path / "d.safetensors", model)
    prediction = jax.jit(gj.Calibrated.decide)(loaded, NEW).prediction
    np.testing.assert_array_equal(prediction, model(NEW).logits.argmax(axis=1) - 1)


def test_a_calibrated_detector_is_an_argument_of_jit(model):
    decide, sizes = jax.jit(gj.Calibrated.decide), []
    for seed in (3, 4):
        decide(gj.calibrate("mahalanobis", model, networks.inputs(60, seed), fit=TRAIN), NEW)
        sizes.append(decide._cache_size())
    assert sizes[0] == sizes[1]


TRAIN = (networks.inputs(50, seed=5), networks.labels(50))


def test_a_fitted_detector_is_fitted_to_other_data(model):
    calibrated = gj.calibrate("mahalanobis", model, HELD_OUT, fit=TRAIN, confident=True)
    expected = gj.fit("mahalanobis", model, TRAIN).score(HELD_OUT)
    np.testing.assert_allclose(calibrated.calibration_scores, np.sort(expected), rtol=1e-4)
    assert calibrated.threshold == calibrated.calibration_scores[1]  # 93 to 123 inputs
    assert calibrated.tpr_interval.low == gj.calibration.tpr_interval(98, 99).low


def test_pixels_are_scaled_as_in_an_evaluation(model):
    held_out, new = (networks.images(n, shape=(6, 6, 3)) for n in (30, 5))
    calibrated = gj.calibrate("energy", model, held_out, preprocess="squash=6,mean=half,std=half")
    inputs = (new.astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(calibrated.score(new), calibrated.fitted.score(inputs), rtol=1e-4)


@pytest.mark.parametrize(
    ("detector", "options", "message"),
    [
        ("mahalanobis", {}, "mahalanobis is fitted to ID training data"),
        ("mahalanobis", {"fit": HELD_OUT}, "the calibration data are the training data"),
        ("energy", {"tpr": 0.999}, "99 calibration scores are too few for tpr=0.999: give at"),
        ("energy", {"tpr": 0.98, "confident": True}, "with confidence 0.95: give at least 149"),
        ("energy", {"tpr": 1.5}, "tpr must be above 0 and below 1, got 1.5"),
        ("gradnorm(select=nowhere)", {}, "matched no parameters"),
        ("energy", {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_is_refused(model, detector, options, message):
    with pytest.raises(ValueError, match=message):
        gj.calibrate(detector, model, HELD_OUT, **options)
