"""What must hold of every detector of the gradient space, whatever the network and the data."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.detectors import DETECTORS, Batch, parse_detectors
from gradnorm_jax.jaxprs import body, inner_programs
from gradnorm_jax.types import LinearHead, Outputs
from tests.last_layers import apply, as_model, random_examples, random_head, score, score_fitted

SPECS = (
    "gradnorm",
    "gradnorm(ord=2,include_bias=True)",
    "feature_norm",
    "residual_norm",
    "exgrad(sign=1)",
    "gini",
    "fisher_trace",
    "grad_uncertainty",
    "feature_hessian",
    "fisher_mahalanobis",
    "scod",
    "pnml",
    "gradorth",
    "gradpca",
    "gradpca(aggregate=max)",
    "average_gradient",
    "average_gradient(rank=2)",
    "nac(steepness=3)",
    "grood",
    "gsc",
)
NON_QUADRATIC = tuple(spec for spec in SPECS if spec != "fisher_mahalanobis")
"""Those without a matrix of classes by classes."""


def test_the_space_is_above():
    tested = {spec.partition("(")[0] for spec in SPECS}
    assert tested >= {name for name, row in DETECTORS.items() if row.space == "gradient"}


def assert_close(actual, expected, **tolerances):
    assert actual.keys() == expected.keys()
    for spec, values in expected.items():
        np.testing.assert_allclose(actual[spec], values, err_msg=spec, **tolerances)


def assert_finite(scores):
    for spec, values in scores.items():
        assert np.isfinite(values).all(), spec


def test_the_order_of_classes_is_of_no_account(x64):
    head = random_head()
    train = random_examples(head)
    features = random_examples(head, 8, seed=2).features
    order = np.array([2, 0, 3, 1])
    permuted = LinearHead(head.kernel[:, order], head.bias[order])
    labels = np.argsort(order)[train.labels].astype(np.int32)
    other = train._replace(logits=train.logits[:, order], labels=labels)
    expected = score(SPECS, head, train, features)
    assert_close(score(SPECS, permuted, other, features), expected, rtol=1e-9)


def test_a_score_does_not_depend_on_its_neighbours(x64):
    head = random_head()
    train = random_examples(head)
    features = random_examples(head, 8, seed=2).features
    alone = [score(SPECS, head, train, row[None]) for row in features]
    together = {spec: [each[spec][0] for each in alone] for spec in SPECS}
    assert_close(score(SPECS, head, train, features), together, rtol=1e-11)


@pytest.mark.slow
def test_float32_keeps_the_digits_of_float64():
    # Logits up to 20 apart.
    head = LinearHead(*(5 * x for x in random_head(32, 10)))
    train = random_examples(head, 300)
    features = random_examples(head, 20, seed=2).features.astype(np.float32)
    narrow = score(SPECS, head, train, features)
    with jax.enable_x64(True):
        wide = score(SPECS, head, train, features.astype(np.float64))
    wide.pop("nac(steepness=3)"), narrow.pop("nac(steepness=3)")  # a rounding may change bins
    assert_close(narrow, wide, rtol=2e-4)


@pytest.mark.slow
def test_fewer_classes_images_and_features():
    """An absent class; one image for each class, and fewer than features; two classes."""
    head = random_head(num_features=12)
    features = random_examples(head, 8, seed=2).features
    train = random_examples(head, 60)
    absent = train._replace(labels=np.where(train.labels == 3, 1, train.labels))
    assert_finite(score(SPECS, head, absent, features))
    few = random_examples(head, 4, seed=3)
    few = few._replace(labels=np.arange(4, dtype=np.int32), logits=few.logits + 9 * np.eye(4))
    assert_finite(score(SPECS, head, few, features))
    two = random_head(num_features=12, num_classes=2)
    assert_finite(score(SPECS, two, random_examples(two), features))


def test_extreme_features_give_finite_scores():
    head = random_head()
    features = np.stack([np.zeros(6), np.full(6, 1e-30), np.full(6, 1e-6), np.full(6, 1e4)])
    assert_finite(score(SPECS, head, random_examples(head), features.astype(np.float32)))


@pytest.mark.slow
def test_bfloat16_is_computed_in_float32():
    head = random_head()
    train = random_examples(head)
    rows = jnp.asarray(random_examples(head, 8, seed=2).features, jnp.bfloat16)
    outputs = apply(as_model(head, jnp.bfloat16).variables, rows)
    narrow = score(SPECS, head, train, outputs=outputs)
    assert {values.dtype for values in narrow.values()} == {np.dtype(np.float32)}
    wide = Outputs(*(x.astype(jnp.float32) for x in outputs))
    assert_close(narrow, score(SPECS, head, train, outputs=wide), rtol=1e-6)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if parse_detectors([spec])[0].fit])
def test_features_of_another_network_are_refused(spec):
    (detector,) = parse_detectors([spec])
    head, other = random_head(6), random_head(4)
    state = detector.fit.state(head, random_examples(head))
    batch = Batch(None, Outputs(jnp.ones((2, 4)), jnp.ones((2, 4))))
    with pytest.raises(ValueError, match=r"features have [45] entries.* is for [67]"):
        detector.score(state, as_model(other), batch)


def largest_array(jaxpr):
    """How many entries the largest result of a program has."""
    sizes = [variable.aval.size for eqn in jaxpr.eqns for variable in eqn.outvars]
    inner = [body(each) for eqn in jaxpr.eqns for each in inner_programs(eqn)]
    return max([*sizes, *map(largest_array, inner)], default=0)


def test_many_classes_need_no_array_of_images_by_features_by_classes():
    head = random_head(num_features=8, num_classes=21843)
    train = random_examples(head, 30)
    states = []
    for detector in parse_detectors(NON_QUADRATIC):
        tracemalloc.start()
        states.append(detector.fit and detector.fit.state(head, train))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # In float64: 30 softmaxes, and a few arrays of 64 numbers for each class.
        assert peak < 1e8, detector.name
    model, rows = as_model(head), jnp.asarray(random_examples(head, 16, seed=2).features)
    batch = Batch(None, apply(model.variables, rows))
    program = score_fitted.trace(parse_detectors(NON_QUADRATIC), states, model, batch)
    assert largest_array(program.jaxpr.jaxpr) <= 16 * 21843
    assert_finite(score_fitted(parse_detectors(NON_QUADRATIC), states, model, batch))
