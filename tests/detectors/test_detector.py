import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import detectors
from gradnorm_jax.detectors import Detector, parse_detectors


def scaled_maximum(state, model, batch, *, scale=1.0, weights=()):
    return scale * batch.outputs.logits.max(axis=-1)


def build_all():
    return (
        detectors.msp(temperature=2),
        detectors.odin(epsilon=0.1),
        detectors.energy(),
        detectors.gradnorm(ord=2, include_bias=True),
        detectors.gradnorm(autodiff=True),
        detectors.gradnorm(select=["head", "body"]),
        *parse_detectors(["gradnorm(ord=inf)", "odin"]),
        Detector("mine", "logits", scaled_maximum, options={"scale": 2.0, "weights": [1, [2]]}),
    )


def test_detectors_built_anew_compile_nothing(model, batch):
    traces = []

    @functools.partial(jax.jit, static_argnames="detectors")
    def score(model, batch, detectors):
        traces.append(detectors)
        return {d.name: d.score(None, model, batch) for d in detectors}

    for _ in range(3):
        values = score(model, batch, build_all())
    assert len(traces) == 1
    assert len(values) == 9


def test_equal_options_make_equal_detectors():
    for one, other in zip(build_all(), build_all(), strict=True):
        assert one == other
        assert hash(one) == hash(other)
        assert pickle.loads(pickle.dumps(one)) == one
    fitted = detectors.mahalanobis()
    assert fitted == detectors.mahalanobis()
    assert len({fitted, detectors.mahalanobis(), detectors.msp()}) == 2
    assert detectors.msp(temperature=2) != detectors.msp(temperature=3)


def test_a_users_own(model, batch):
    detector = Detector("mine", "logits", scaled_maximum)
    values = detector.score(None, model, batch)
    np.testing.assert_array_equal(values, batch.outputs.logits.max(axis=1))
    twice = Detector("twice", "logits", scaled_maximum, options={"scale": 2.0})
    np.testing.assert_array_equal(twice.score(None, model, batch), 2 * values)


def test_options_are_kept_sorted_and_hashable():
    options = {"weights": [1, [2, 3]], "scale": 1.0}
    detector = Detector("mine", "logits", scaled_maximum, options=options)
    assert detector.options == (("scale", 1.0), ("weights", (1, (2, 3))))
    assert detector == dataclasses.replace(detector)


def test_a_detector_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        detectors.msp().name = "other"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name must be a text that is not empty, got ''"),
        ({"name": 3}, "name must be a text that is not empty, got 3"),
        ({"needs": "features"}, 'needs must be "logits", "outputs" or "network", got \'features\''),
        ({"score_fn": "msp"}, "score_fn must be a function"),
        ({"options": {"w": np.ones(3)}}, "option w of detector 'mine' must be hashable.* ndarray"),
        ({"options": {"w": [jnp.ones(3)]}}, "option w of detector 'mine' must be hashable"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Detector(**{"name": "mine", "needs": "logits", "score_fn": scaled_maximum, **fields})
