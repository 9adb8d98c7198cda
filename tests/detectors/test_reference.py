"""All detectors of output and features against their formulas, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.detectors import DETECTORS, Batch, parse_detectors
from gradnorm_jax.statistics import Examples
from gradnorm_jax.statistics.activations import bucket_values, buckets
from gradnorm_jax.statistics.statistic import init_all, passes
from gradnorm_jax.types import Head, LinearHead, Model, Outputs, Variables
from tests.detectors import reference
from tests.detectors.reference import Data

NAMES = list(reference.SCORES)


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


def fit(detector, data):
    head = LinearHead(data.kernel, data.bias)
    return detector.fit and detector.fit.state(head, examples_of(data))


def score(detector, state, data):
    outputs = Outputs(jnp.asarray(data.features), jnp.asarray(data.logits))
    return np.asarray(detector.score(state, model_of(data), Batch(None, outputs)))


def scores_of(name, train, test):
    (detector,) = parse_detectors([name])
    return score(detector, fit(detector, train), test)


TRAIN, TEST = make(150), make(40, seed=1, spread=2.0)


def test_every_detector_has_its_formula_here():
    without = {"odin", "gradnorm"}
    named = {name.partition("(")[0].partition("+")[0] for name in NAMES}
    spaces = {name for name, row in DETECTORS.items() if row.space != "gradient"}
    assert spaces - without == named


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_formula(name, x64):
    expected = reference.SCORES[name](TRAIN, TEST)
    # The temperature is right to 1e-5, and WeiPer counts float32 numbers.
    rtol = {"temperature_scaling": 1e-5, "weiper(repeats=3)": 1e-5}.get(name, 1e-8)
    np.testing.assert_allclose(scores_of(name, TRAIN, TEST), expected, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if parse_detectors(name)[0].fit])
def test_neither_batches_nor_order_nor_processes_matter(name, x64):
    (detector,) = parse_detectors([name])
    head = LinearHead(TRAIN.kernel, TRAIN.bias)
    order = np.random.default_rng(5).permutation(150)
    known = {}
    for level in passes(detector.fit.statistics):
        shares = []
        for share in (order[:1], order[1:70], order[70:]):
            values = init_all(level, head, known)
            for rows in np.array_split(share, -(-len(share) // 11)):
                block = examples_of(TRAIN, rows)
                values = [s.update(v, block) for s, v in zip(level, values, strict=True)]
            shares.append(values)
        merged = shares.pop()
        for share in shares:
            merged = [s.merge(a, b) for s, a, b in zip(level, share, merged, strict=True)]
        known |= zip(level, merged, strict=True)
    state = detector.fit.finalize(head, *(known[s] for s in detector.fit.statistics))
    whole = fit(detector, TRAIN)
    np.testing.assert_allclose(
        score(detector, state, TEST), score(detector, whole, TEST), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("name", [name for name in NAMES if "weiper" not in name])
def test_the_order_of_classes_does_not_matter(name, x64):
    order = np.random.default_rng(2).permutation(5)

    def permuted(data):
        labels = np.argsort(order)[data.labels].astype(np.int32)
        kernel, bias, logits = data.kernel[:, order], data.bias[order], data.logits[:, order]
        return Data(data.features, logits, labels, kernel, bias)

    expected = scores_of(name, TRAIN, TEST)
    actual = scores_of(name, permuted(TRAIN), permuted(TEST))
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_scored_by_itself(name):
    (detector,) = parse_detectors([name])
    state, every = fit(detector, TRAIN), slice(None)

    def of(rows):
        data = TEST._replace(features=TEST.features[rows], logits=TEST.logits[rows])
        return score(detector, state, data)

    together = of(every)
    np.testing.assert_allclose(of([3]), together[[3]], rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(of(every)[::-1], of(np.arange(40)[::-1]), rtol=2e-4, atol=1e-4)


CASES = {
    "a class without images": make(150)._replace(labels=np.arange(150, dtype=np.int32) % 4),
    "one image a class": make(12, num_features=30, num_classes=12),
    "more features than images": make(30, num_features=100, num_classes=3),
    "two classes": make(60, num_classes=2),
    "21,843 classes": make(60, num_features=8, num_classes=21_843),
}


@pytest.mark.parametrize("case", CASES)
def test_finite_where_data_are_scarce(case):
    train = CASES[case]
    rng = np.random.default_rng(4)
    features = np.abs(rng.normal(size=(6, train.features.shape[1])))
    features[0] = 0.0
    test = train.of(features)
    for name in NAMES:
        if case == "one image a class" and "mahalanobis" in name:
            with pytest.raises(ValueError, match="more images per class"):
                scores_of(name, train, test)
        else:
            found = scores_of(name, train, test)
            assert found.shape == (6,), name
            assert np.isfinite(found).all(), name


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_widened(name):
    (detector,) = parse_detectors([name])
    state = fit(detector, TRAIN)
    narrow = TEST._replace(
        features=jnp.asarray(TEST.features, jnp.bfloat16),
        logits=jnp.asarray(TEST.logits, jnp.bfloat16),
    )
    wide = narrow._replace(
        features=narrow.features.astype(np.float32), logits=narrow.logits.astype(np.float32)
    )
    found = score(detector, state, narrow)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, score(detector, state, wide))
