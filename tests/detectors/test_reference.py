"""All detectors of output and features against their formulas, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.detectors import DETECTORS, Batch, parse_detectors
from gradnorm_jax.statistics import Examples, learn
from gradnorm_jax.statistics.activations import bucket_values, buckets
from gradnorm_jax.statistics.statistic import init_all, passes
from gradnorm_jax.types import Head, LinearHead, Model, Outputs, Variables
from tests.detectors import reference
from tests.detectors.reference import Data

NAMES = list(reference.SCORES)
EVERY = parse_detectors(NAMES)


def make(num_images, num_features=24, num_classes=5, seed=0, spread=1.0):
    """Rectified features about class means, in numbers that are the middle of their bucket."""
    means = 2 * np.random.default_rng(99).normal(size=(num_classes, num_features))
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    raw = means[labels] + spread * rng.normal(size=(num_images, num_features))
    features = bucket_values()[buckets(np.maximum(raw, 0))]
    kernel = means.T / 10 + 0.05 * np.random.default_rng(98).normal(size=means.T.shape)
    bias = np.random.default_rng(97).normal(size=num_classes) / 10
    logits = features @ kernel + bias
    return Data(features, logits, labels.astype(np.int32), kernel, bias)


def model_of(data):
    def apply(variables, features):
        kernel, bias = variables.params["kernel"], variables.params["bias"]
        return Outputs(features, features @ kernel + bias[None])

    params = {"kernel": jnp.asarray(data.kernel), "bias": jnp.asarray(data.bias)}
    head = Head(("kernel",), ("bias",))
    return Model(jax.tree_util.Partial(apply), Variables(params), head)


def examples_of(data, rows=slice(None)):
    every = Examples(data.features, data.logits, data.labels, np.arange(len(data.labels)))
    return Examples(*(x[rows] for x in every))


def statistics_of(detectors):
    return list(dict.fromkeys(s for d in detectors if d.fit for s in d.fit.statistics))


def states_of(detectors, known, data):
    head = LinearHead(data.kernel, data.bias)
    return [
        d.fit and d.fit.finalize(head, *(known[s] for s in d.fit.statistics)) for d in detectors
    ]


def fit(detectors, data):
    head = LinearHead(data.kernel, data.bias)
    known = learn(statistics_of(detectors), head, [examples_of(data)])
    return states_of(detectors, known, data)


@functools.partial(jax.jit, static_argnames="detectors")
def _scores(model, states, outputs, detectors):
    batch = Batch(None, outputs)
    return [d.score(s, model, batch) for d, s in zip(detectors, states, strict=True)]


def score(detectors, states, data):
    """Scores by name, of all detectors in one program."""
    outputs = Outputs(jnp.asarray(data.features), jnp.asarray(data.logits))
    found = _scores(model_of(data), states, outputs, tuple(detectors))
    return dict(zip((d.name for d in detectors), map(np.asarray, found), strict=True))


def scores_of(train, test, detectors=None):
    detectors = EVERY if detectors is None else detectors
    return score(detectors, fit(detectors, train), test)


def assert_close(actual, expected, **tolerance):
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], err_msg=name, **tolerance)


TRAIN, TEST = make(150), make(40, seed=1, spread=2.0)


def test_every_detector_of_features_has_its_formula_here():
    named = {term.partition("(")[0] for name in NAMES for term in name.split("+")}
    spaces = ("feature", "rectified")
    assert named >= {name for name, row in DETECTORS.items() if row.space in spaces}


def test_all_equal_their_formulas(x64):
    found = scores_of(TRAIN, TEST)
    for name, formula in reference.SCORES.items():
        # The temperature is right to 1e-5, and WeiPer counts float32 numbers.
        rtol = {"temperature_scaling": 1e-5, "weiper(repeats=3)": 1e-5}.get(name, 1e-8)
        expected = {name: formula(TRAIN, TEST)}
        assert_close(found, expected, rtol=rtol, atol=1e-9)


@pytest.mark.slow
def test_neither_batches_nor_order_nor_processes_matter():
    fitted = [d for d in EVERY if d.fit]
    head = LinearHead(TRAIN.kernel, TRAIN.bias)
    order = np.random.default_rng(5).permutation(150)
    known = {}
    for level in passes(statistics_of(fitted)):
        shares = []
        for share in (order[:30], order[30:90], order[90:]):
            values = init_all(level, head, known)
            for rows in np.split(share, len(share) // 30):
                block = examples_of(TRAIN, rows)
                values = [s.update(v, block) for s, v in zip(level, values, strict=True)]
            shares.append(values)
        merged = shares.pop()
        for share in shares:
            merged = [s.merge(a, b) for s, a, b in zip(level, share, merged, strict=True)]
        known |= zip(level, merged, strict=True)
    states = states_of(fitted, known, TRAIN)
    assert_close(score(fitted, states, TEST), scores_of(TRAIN, TEST, fitted), rtol=1e-4, atol=1e-4)


def test_the_order_of_classes_does_not_matter():
    order = np.random.default_rng(2).permutation(5)

    def permuted(data):
        labels = np.argsort(order)[data.labels].astype(np.int32)
        kernel, bias, logits = data.kernel[:, order], data.bias[order], data.logits[:, order]
        return Data(data.features, logits, labels, kernel, bias)

    # WeiPer's random directions go by the number of the class.
    detectors = [d for d in EVERY if "weiper" not in d.name]
    actual = scores_of(permuted(TRAIN), permuted(TEST), detectors)
    assert_close(actual, scores_of(TRAIN, TEST, detectors), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_image_is_scored_by_itself():
    states = fit(EVERY, TRAIN)
    together = score(EVERY, states, TEST)

    def of(rows):
        data = TEST._replace(features=TEST.features[rows], logits=TEST.logits[rows])
        return score(EVERY, states, data)

    assert_close(of([3]), {k: v[[3]] for k, v in together.items()}, rtol=2e-4, atol=1e-4)
    backwards = of(np.arange(40)[::-1])
    assert_close(backwards, {k: v[::-1] for k, v in together.items()}, rtol=2e-4, atol=1e-4)


CASES = {
    "a class without images": make(150)._replace(labels=np.arange(150, dtype=np.int32) % 4),
    "one image a class": make(12, num_features=30, num_classes=12),
    "more features than images": make(30, num_features=100, num_classes=3),
    "two classes": make(60, num_classes=2),
    "21,843 classes": make(60, num_features=8, num_classes=21_843),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_finite_where_data_are_scarce(case):
    train = CASES[case]
    features = np.abs(np.random.default_rng(4).normal(size=(6, train.features.shape[1])))
    features[0] = 0.0
    detectors = EVERY
    if len(set(train.labels)) == len(train.labels):
        detectors = [d for d in EVERY if "mahalanobis" not in d.name]
        for each in set(EVERY) - set(detectors):
            with pytest.raises(ValueError, match="more images per class"):
                fit([each], train)
    if case == "21,843 classes":
        detectors = [d for d in detectors if d.name != "she"]
        with pytest.raises(ValueError, match="none of the training images is predicted as label"):
            fit(parse_detectors("she"), train)
    for name, found in scores_of(train, train.of(features), detectors).items():
        assert found.shape == (6,), name
        assert np.isfinite(found).all(), name


@pytest.mark.slow
def test_bfloat16_is_widened():
    states = fit(EVERY, TRAIN)
    narrow = TEST._replace(
        features=jnp.asarray(TEST.features, jnp.bfloat16),
        logits=jnp.asarray(TEST.logits, jnp.bfloat16),
    )
    wide = narrow._replace(
        features=narrow.features.astype(np.float32), logits=narrow.logits.astype(np.float32)
    )
    found, expected = score(EVERY, states, narrow), score(EVERY, states, wide)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    assert_close(found, expected, rtol=2e-4, atol=1e-4)
