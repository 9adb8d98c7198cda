"""What must hold of every detector of the gradient space, whatever the network and the data."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.detectors import Batch, parse_detectors
from gradnorm_jax.jaxprs import body, inner_programs
from gradnorm_jax.types import LinearHead
from tests.last_layers import apply, as_model, random_examples, random_head, score

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


def finite(spec, head, train, features):
    values = np.asarray(score(spec, head, train, features))
    assert values.shape == (len(features),)
    assert np.isfinite(values).all(), values
    return values


@pytest.mark.parametrize("spec", SPECS)
def test_the_order_of_classes_is_of_no_account(x64, spec):
    head = random_head()
    train = random_examples(head)
    features = random_examples(head, 8, seed=2).features
    order = np.array([2, 0, 3, 1])
    permuted = LinearHead(head.kernel[:, order], head.bias[order])
    labels = np.argsort(order)[train.labels].astype(np.int32)
    other = train._replace(logits=train.logits[:, order], labels=labels)
    np.testing.assert_allclose(
        score(spec, permuted, other, features), score(spec, head, train, features), rtol=1e-9
    )


@pytest.mark.parametrize("spec", SPECS)
def test_a_score_does_not_depend_on_its_neighbours(x64, spec):
    head = random_head()
    train = random_examples(head)
    features = random_examples(head, 5, seed=2).features
    together = score(spec, head, train, features, jit=False)
    alone = [score(spec, head, train, row[None], jit=False)[0] for row in features]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_an_absent_class_a_single_image_and_too_few(spec):
    head = random_head(num_features=12)
    features = random_examples(head, 4, seed=2).features
    train = random_examples(head, 60)
    absent = train._replace(labels=np.where(train.labels == 3, 1, train.labels))
    finite(spec, head, absent, features)
    # One image for each class, and fewer of them than features.
    few = random_examples(head, 4, seed=3)
    few = few._replace(labels=np.arange(4, dtype=np.int32))
    if spec == "grood":
        few = few._replace(logits=np.eye(4))
    finite(spec, head, few, features)


@pytest.mark.parametrize("spec", SPECS)
def test_extreme_features_give_finite_scores(spec):
    head = random_head()
    train = random_examples(head)
    features = np.stack([np.zeros(6), np.full(6, 1e-6), np.full(6, 1e4)]).astype(np.float32)
    finite(spec, head, train, features)


@pytest.mark.parametrize("spec", SPECS)
def test_two_classes(spec):
    head = random_head(num_classes=2)
    finite(spec, head, random_examples(head), random_examples(head, 4, seed=2).features)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_is_computed_in_float32(spec):
    head = random_head()
    (detector,) = parse_detectors([spec])
    state = detector.fit and detector.fit.state(head, random_examples(head))
    model = as_model(head, jnp.float32)
    rows = jnp.asarray(random_examples(head, 4, seed=2).features, jnp.bfloat16)
    outputs = apply(as_model(head, jnp.bfloat16).variables, rows)
    narrow = detector.score(state, model, Batch(rows, outputs))
    assert narrow.dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
    np.testing.assert_array_equal(narrow, detector.score(state, model, Batch(rows, wide)))


def largest_array(jaxpr):
    """How many entries the largest result of a program has."""
    sizes = [variable.aval.size for eqn in jaxpr.eqns for variable in eqn.outvars]
    inner = [body(each) for eqn in jaxpr.eqns for each in inner_programs(eqn)]
    return max([*sizes, *map(largest_array, inner)], default=0)


@pytest.mark.parametrize("spec", NON_QUADRATIC)
def test_many_classes_need_no_array_of_images_by_features_by_classes(spec):
    head = random_head(num_features=8, num_classes=21843)
    train = random_examples(head, 30)
    features = random_examples(head, 16, seed=2).features
    (detector,) = parse_detectors([spec])
    tracemalloc.start()
    state = detector.fit and detector.fit.state(head, train)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # In float64: 30 softmaxes, and a few arrays of 64 numbers for each class.
    assert peak < 1e8
    model = as_model(head)
    rows = jnp.asarray(features)
    batch = Batch(rows, apply(model.variables, rows))
    assert np.isfinite(detector.score(state, model, batch)).all()
    program = jax.make_jaxpr(detector.score)(state, model, batch)
    assert largest_array(program.jaxpr) <= 16 * 21843
