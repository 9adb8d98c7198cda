import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


def exact_residual(logits, target, temperature):
    """The difference p - q in extended precision; its largest entry from the others."""
    z, q = (np.asarray(x).astype(np.longdouble) for x in (logits, target))
    z, q = z / temperature, np.broadcast_to(q, z.shape)
    weights = np.exp(z - z.max(axis=-1, keepdims=True))
    others = weights.copy()
    at = np.arange(len(z)), z.argmax(axis=-1)
    others[at] = 0
    total = weights.sum(axis=-1)
    residual = weights / total[:, None] - q
    residual[at] = (1 - q[at]) - others.sum(axis=-1) / total
    return residual


def with_margin(num_classes, margin):
    """Float32 logits of which one leads the others by at least `margin`."""
    rng = np.random.default_rng(num_classes)
    logits = rng.normal(size=(6, num_classes)).clip(-3, 3)
    logits[np.arange(6), rng.integers(num_classes, size=6)] = 3 + margin
    return jnp.asarray(logits, jnp.float32)


def smoothed_little(logits):
    return scores.smoothed_prediction(logits, smoothing=1e-3)


@pytest.mark.parametrize(
    "make_target", [scores.one_hot_prediction, scores.smoothed_prediction, smoothed_little]
)
@pytest.mark.parametrize("margin", [10, 16, 17, 20, 30, 60])
@pytest.mark.parametrize("num_classes", [2, 10, 1000, 21843])
@pytest.mark.parametrize("jit", [False, True])
def test_residuals_of_confident_predictions_keep_their_digits(
    jit, num_classes, margin, make_target
):
    logits = with_margin(num_classes, margin)
    target = make_target(logits)
    score = jax.jit(scores.residual_norm) if jit else scores.residual_norm
    expected = np.abs(exact_residual(logits, target, 1)).sum(axis=-1).astype(float)
    np.testing.assert_allclose(score(logits, target=target), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_residuals_to_any_distribution(scale, num_classes):
    rng = np.random.default_rng(num_classes)
    logits = jnp.asarray(rng.normal(size=(20, num_classes)) * scale, jnp.float32)
    uniform = jnp.full((1, num_classes), 1 / num_classes)
    for target in (uniform, jnp.asarray(rng.dirichlet(np.ones(num_classes), 20), jnp.float32)):
        expected = np.abs(exact_residual(logits, target, 2)).sum(axis=-1).astype(float)
        actual = scores.residual_norm(logits, temperature=2.0, target=target)
        np.testing.assert_allclose(actual, expected, rtol=3e-6)


@pytest.mark.parametrize("margin", [5.0, 17.0, 40.0])
def test_autodiff_of_confident_predictions_keeps_its_digits_too(margin):
    features = jnp.asarray(np.random.default_rng(0).random(size=(4, 6)), jnp.float32)
    kernel = jnp.zeros((6, 10)).at[:, 3].set(margin)
    target = jnp.zeros((1, 10)).at[0, 3].set(1.0)
    np.testing.assert_allclose(
        by_autodiff(kernel, None, features, target=target),
        scores.gradnorm(features, features @ kernel, target=target),
        rtol=3e-6,
    )


def two_rows(**shapes):
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (two_rows(features=(7, 7, 7, 6), logits=(7, 10)), r"features must be \[B, D\].*7, 7, 7, 6"),
        (
            two_rows(features=(1, 6), logits=(4, 10)),
            r"a row for each image, got .*\(1, 6\) and \(4, 10\)",
        ),
        (
            two_rows(features=(6,), logits=(6,)),
            r"features .* got shape \(6,\); for a single image give features\[None\]",
        ),
        (two_rows(features=(4, 6), logits=(10,)), r"logits must be \[B, C\].* give logits\[None\]"),
        (
            two_rows(features=(4, 6), logits=(4, 10), target=(4, 1)),
            r"target must be \[B, C\].*\(4, 1\)",
        ),
        (
            two_rows(features=(4, 6), logits=(4, 10), target=(2, 10)),
            r"or \[1, C\], got shape \(2, 10\)",
        ),
        (two_rows(features=(4, 6), logits=(4, 10), target=(10,)), r"give target\[None\]"),
        ({"features": None, "logits": np.ones((4, 10))}, "gradnorm_of_parameters"),
        (
            {"features": "x", "logits": np.ones((4, 10))},
            r"features must be an array \[B, D\], got str",
        ),
        (
            {"features": np.ones((4, 6)), "logits": Outputs(1, 2)},
            "got Outputs: take its .features or .logits",
        ),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        scores.gradnorm(**arguments)


def test_the_factors_check_shapes_too():
    with pytest.raises(ValueError, match=r"features must be \[B, D\]"):
        scores.feature_norm(jnp.ones(3))
    with pytest.raises(ValueError, match=r"logits must be \[B, C\]"):
        scores.residual_norm(jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"target must be \[B, C\]"):
        scores.residual_norm(jnp.ones((2, 3)), target=jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=r"target must be \[B, C\]"):
        by_autodiff(jnp.ones((2, 3)), None, jnp.ones((4, 2)), target=jnp.ones((4, 1)))


def test_lists_numpy_arrays_and_integers():
    features, logits = [[1, -2], [0, 3]], [[3, 1, 0], [1, 1, 2]]
    expected = scores.gradnorm(jnp.asarray(features, jnp.float32), jnp.asarray(logits, jnp.float32))
    assert expected.dtype == jnp.float32
    for convert in (list, np.array, jnp.array):
        actual = scores.gradnorm(convert(features), convert(logits))
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == jnp.float32
    target = [[1, 0, 0]]
    np.testing.assert_array_equal(
        scores.residual_norm(logits, target=target),
        scores.residual_norm(jnp.array(logits), target=jnp.array(target, jnp.float32)),
    )


@pytest.mark.parametrize("ord", [0.5, 0.7, 1, 1.5, 2, 3, math.inf])
def test_scores_can_be_differentiated_at_features_that_are_zero(ord):
    features = jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    logits = jnp.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])

    def total(features, logits):
        return scores.gradnorm(features, logits, ord=ord, include_bias=False).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(features, logits)
    assert all(bool(jnp.isfinite(each).all()) for each in gradients)
    assert (gradients[0][1] == 0).all()
    assert (gradients[1][2] == 0).all()


def test_autodiff_compiles_once():
    traces = []

    def apply(variables, features):
        traces.append(features.shape)
        return Outputs(features, features @ variables.params["kernel"])

    features, counts = jnp.ones((4, 6)), []
    for value in (1.0, 2.0, 3.0):
        variables = Variables({"kernel": jnp.full((6, 3), value)})
        model = Model(jax.tree_util.Partial(apply), variables, Head(("kernel",)))
        scores.gradnorm_by_autodiff(model, features, temperature=value, ord=2)
        counts.append(len(traces))
    assert counts[0] == counts[-1]


def test_autodiff_needs_a_head():
    model = Model(jax.tree_util.Partial(max), Variables({}), None)
    with pytest.raises(ValueError, match=r"no linear last layer.*gradnorm_of_parameters"):
        scores.gradnorm_by_autodiff(model, jnp.ones((2, 3)))


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_autodiff_of_a_convolutional_head_with_the_batch_over_devices(axis_type):
    # Gradients of a convolution's kernel under vmap come out as zeros where a compiler splits them.
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(1, 1, 6, 5)), jnp.float32)

    def apply(variables, images):
        logits = jax.lax.conv_general_dilated(
            images,
            variables.params["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return Outputs(images[:, 0, 0], logits[:, 0, 0])

    model = Model(jax.tree_util.Partial(apply), Variables({"kernel": kernel}), Head(("kernel",)))
    images = jnp.asarray(rng.normal(size=(16, 1, 1, 6)), jnp.float32)
    expected = scores.gradnorm(*model(images))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(getattr(AxisType, axis_type),))
    with jax.set_mesh(mesh):
        split = jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
        np.testing.assert_allclose(scores.gradnorm_by_autodiff(model, split), expected, rtol=2e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_bad_smoothing(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\]"):
        scores.smoothed_prediction(jnp.zeros((1, 3)), smoothing=smoothing)


def test_bad_order():
    with pytest.raises(ValueError, match=r"ord must be at least 0\.5"):
        scores.gradnorm(jnp.ones((1, 2)), jnp.ones((1, 2)), ord=0)
