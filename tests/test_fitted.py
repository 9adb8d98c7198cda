import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax.scores import mahalanobis
from gradnorm_jax.statistics import class_sums, moments

RNG = np.random.default_rng(0)
PARAMS = {
    "body": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
}
INPUTS = RNG.normal(size=(50, 6)).astype(np.float32)
LABELS = RNG.integers(3, size=50)


def logits(params, inputs):
    return jnp.tanh(inputs @ params["body"]) @ params["head"]


@pytest.fixture(scope="module")
def model():
    return gj.from_apply(logits, PARAMS, INPUTS[:2])


def test_a_detector_that_learns_nothing_needs_no_data(model):
    fitted = gj.fit("gradnorm(ord=2)", model)
    expected = gj.gradnorm(*model(INPUTS), ord=2)
    np.testing.assert_allclose(fitted.score(INPUTS), expected, rtol=1e-6)


def test_a_fitted_detector_is_a_pure_function_under_jit(model):
    fitted = gj.fit("mahalanobis", model, (INPUTS, LABELS), batch_size=7)
    features = model(INPUTS).features
    gaussians = gj.tied_gaussians(moments(features), class_sums(features, LABELS, 3))
    expected = mahalanobis(features, gaussians)
    np.testing.assert_allclose(jax.jit(gj.Fitted.score)(fitted, INPUTS), expected, rtol=1e-4)
    scores = jax.jit(gj.Fitted.score)
    size = scores._cache_size()  # of all that have compiled this function
    for _ in range(3):
        scores(gj.fit(gj.detectors.mahalanobis(), model, (INPUTS, LABELS)), INPUTS)
    assert scores._cache_size() == size


def test_data_are_asked_for(model):
    with pytest.raises(ValueError, match="mahalanobis is fitted to ID training data"):
        gj.fit("mahalanobis", model)
    with pytest.raises(ValueError, match=r"labels outside of 0\.\.2"):
        gj.fit("mahalanobis", model, INPUTS)
