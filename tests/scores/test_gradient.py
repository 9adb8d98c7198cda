import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import scores
from gradnorm_jax.types import Head, Model, Outputs, Variables


def random_head(batch, num_features, num_classes, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(num_classes)
    features = np.maximum(rng.normal(size=(batch, num_features)), 0)
    kernel = rng.normal(size=(num_features, num_classes)) * scale / np.sqrt(num_features)
    bias = rng.normal(size=num_classes) * scale
    return [jnp.asarray(x, dtype) for x in (features, kernel, bias)]


def logits_of(features, kernel, bias):
    return features @ kernel + bias[None]


def by_autodiff(kernel, bias, features, **options):
    """The definition, on a network that is nothing but a last layer."""

    def apply(variables, features):
        params = variables.params
        logits = features @ params["kernel"]
        return Outputs(features, logits if bias is None else logits + params["bias"][None])

    head = Head(("kernel",), None if bias is None else ("bias",))
    variables = Variables({"kernel": kernel, "bias": bias})
    model = Model(jax.tree_util.Partial(apply), variables, head)
    return scores.gradnorm_by_autodiff(model, features, **options)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("ord", [0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("include_bias", [False, True])
def test_closed_form_is_the_definition(x64, include_bias, ord, temperature, scale):
    features, kernel, bias = random_head(3, 16, 40, scale)
    options = {"temperature": temperature, "ord": ord, "include_bias": include_bias}
    closed = scores.gradnorm(features, logits_of(features, kernel, bias), **options)
    defined = by_autodiff(kernel, bias, features, **options)
    np.testing.assert_allclose(closed, defined, rtol=1e-10)


@pytest.mark.parametrize("num_classes", [1000, 21843])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_many_classes(x64, num_classes, scale):
    features, kernel, bias = random_head(2, 24, num_classes, scale)
    logits = logits_of(features, kernel, bias)
    reference = by_autodiff(kernel, bias, features)
    np.testing.assert_allclose(scores.gradnorm(features, logits), reference, rtol=1e-11)
    narrow = scores.gradnorm(features.astype(jnp.float32), logits.astype(jnp.float32))
    # Rounding a logit of 1e4 to float32 moves it by up to 5e-4; the score can feel that much.
    np.testing.assert_allclose(narrow, reference, rtol=2e-6 if scale < 1e4 else 1e-3)


@pytest.mark.parametrize("make_target", [scores.one_hot_prediction, scores.smoothed_prediction])
@pytest.mark.parametrize("ord", [1, 2])
def test_other_targets(x64, make_target, ord):
    features, kernel, bias = random_head(4, 8, 5)
    logits = logits_of(features, kernel, bias)
    options = {"temperature": 2.0, "ord": ord, "target": make_target(logits)}
    np.testing.assert_allclose(
        scores.gradnorm(features, logits, **options),
        by_autodiff(kernel, bias, features, **options),
        rtol=1e-12,
    )


def test_uniform_given_as_target_changes_nothing(x64):
    features, kernel, bias = random_head(4, 8, 5)
    logits = logits_of(features, kernel, bias)
    np.testing.assert_allclose(
        scores.gradnorm(features, logits, target=jnp.full((1, 5), 0.2)),
        scores.gradnorm(features, logits),
        rtol=1e-13,
    )


def test_hand_computed():
    # h = (1, -2), p = (3/4, 1/4): U = 3, V = 1/2
    features, logits = jnp.array([[1.0, -2.0]]), jnp.log(jnp.array([[3.0, 1.0]]))
    np.testing.assert_allclose(scores.feature_norm(features), [3.0])
    np.testing.assert_allclose(scores.residual_norm(logits), [0.5], rtol=1e-6)
    np.testing.assert_allclose(scores.gradnorm(features, logits), [1.5], rtol=1e-6)
    np.testing.assert_allclose(
        scores.gradnorm(features, logits, include_bias=True), [2.0], rtol=1e-6
    )
    np.testing.assert_allclose(scores.gradnorm(features, logits, ord=math.inf), [0.5], rtol=1e-6)


def test_all_ones_target_of_the_official_code_is_c_times_the_score(x64):
    features, kernel, bias = random_head(3, 8, 6)

    def official(kernel, h):
        return -jax.nn.log_softmax(h @ kernel + bias).sum()

    gradients = jax.vmap(jax.grad(official), (None, 0))(kernel, features)
    np.testing.assert_allclose(
        jnp.abs(gradients).sum((1, 2)),
        6 * scores.gradnorm(features, logits_of(features, kernel, bias)),
        rtol=1e-12,
    )


def test_head_without_bias(x64):
    features, kernel, _ = random_head(3, 8, 6)
    np.testing.assert_allclose(
        by_autodiff(kernel, None, features),
        scores.gradnorm(features, features @ kernel),
        rtol=1e-12,
    )


def test_no_bias_to_include():
    with pytest.raises(ValueError, match="last layer has no bias"):
        by_autodiff(jnp.ones((2, 3)), None, jnp.ones((1, 2)), include_bias=True)


def test_bfloat16_is_accumulated_in_float32():
    features, kernel, bias = random_head(3, 512, 1000, dtype=jnp.bfloat16)
    logits = logits_of(features, kernel, bias)
    wide = scores.gradnorm(features.astype(jnp.float32), logits.astype(jnp.float32))
    narrow = scores.gradnorm(features, logits)
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide)


def test_a_score_does_not_depend_on_its_neighbours():
    features, kernel, bias = random_head(9, 32, 10, dtype=np.float32)
    score = jax.jit(scores.gradnorm)
    logits = logits_of(features, kernel, bias)
    together = score(features, logits)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_array_equal(score(features[order], logits[order]), together[order])
    alone = [score(features[i : i + 1], logits[i : i + 1])[0] for i in range(9)]
    np.testing.assert_allclose(together, alone, rtol=3e-7)


def test_traced_once_per_shape():
    traces = []

    @functools.partial(jax.jit, static_argnames="ord")
    def score(features, logits, temperature, ord):
        traces.append(ord)
        return scores.gradnorm(features, logits, temperature=temperature, ord=ord)

    features, logits = jnp.ones((4, 8)), jnp.ones((4, 3))
    for temperature in (1.0, 2.0, 3.0):
        score(features, logits, temperature, ord=1)
    assert traces == [1]


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_bad_smoothing(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\]"):
        scores.smoothed_prediction(jnp.zeros((1, 3)), smoothing=smoothing)


def test_bad_order():
    with pytest.raises(ValueError, match=r"ord must be at least 0\.5"):
        scores.gradnorm(jnp.ones((1, 2)), jnp.ones((1, 2)), ord=0)
