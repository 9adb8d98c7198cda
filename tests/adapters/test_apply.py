import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.adapters.apply import from_apply
from gradnorm_jax.types import Head, head_parameters

KEYS = jax.random.split(jax.random.key(0), 4)
IMAGES = jax.random.normal(KEYS[0], (8, 2, 3))


def make_params(kernel_shape=(4, 5)):
    return {
        "body": {"w": jax.random.normal(KEYS[1], (6, 4))},
        "head": {
            "w": jax.random.normal(KEYS[2], kernel_shape),
            "b": jax.random.normal(KEYS[3], (5,)),
        },
    }


def function(params, images):
    features = jnp.tanh(images.reshape(images.shape[0], -1) @ params["body"]["w"])
    head = params["head"]
    return features, features @ head["w"].reshape(4, 5) + head["b"][None]


@pytest.mark.parametrize("kernel_shape", [(4, 5), (1, 1, 4, 5)])
@pytest.mark.parametrize("head", [None, "head", "head/w", ("head",)])
def test_the_head_is_found_by_its_shape(head, kernel_shape):
    params = make_params(kernel_shape)
    model = from_apply(function, params, IMAGES, head=head)
    assert model.head == Head(("head", "w"), ("head", "b"))
    outputs = model(IMAGES)
    expected_features, expected_logits = function(params, IMAGES)
    np.testing.assert_array_equal(outputs.features, expected_features)
    np.testing.assert_array_equal(outputs.logits, expected_logits)
    kernel, bias = head_parameters(model)
    np.testing.assert_array_equal(kernel, params["head"]["w"].reshape(4, 5))
    np.testing.assert_array_equal(bias, params["head"]["b"])


def test_parameters_in_sequences_and_no_bias():
    params = make_params()
    listed = [params["body"]["w"], (params["head"]["w"],)]

    def without_bias(params, images):
        features = jnp.tanh(images.reshape(images.shape[0], -1) @ params[0])
        return features, features @ params[1][0]

    for head in (None, "1/0", (1,)):
        assert from_apply(without_bias, listed, IMAGES, head=head).head == Head((1, 0))


def test_the_head_is_all_there_is():
    params = {"kernel": jnp.eye(6)[:, :5]}
    model = from_apply(
        lambda p, x: (x.reshape(8, 6), x.reshape(8, 6) @ p["kernel"]), params, np.asarray(IMAGES)
    )
    assert model.head == Head(("kernel",))
    np.testing.assert_array_equal(model(IMAGES).logits, IMAGES.reshape(8, 6)[:, :5])


def test_bias_is_told_from_other_vectors_by_its_name():
    def scaled(params, images):
        features = images.reshape(8, 6)
        head = params["head"]
        return features, features @ head["kernel"] + head["bias"][None]

    head = {"kernel": jnp.ones((6, 5)), "bias": jnp.arange(5.0), "running_mean": jnp.ones(5)}
    model = from_apply(scaled, {"head": head}, IMAGES)
    assert model.head == Head(("head", "kernel"), ("head", "bias"))
    unclear = {"head": {"kernel": head["kernel"], "b": head["bias"], "c": head["running_mean"]}}
    with pytest.raises(ValueError, match=r"beside the kernel head/kernel .*\['b', 'c'\]"):
        from_apply(
            lambda p, x: (x.reshape(8, 6), x.reshape(8, 6) @ p["head"]["kernel"]), unclear, IMAGES
        )


def test_arrays_that_are_not_parameters_ride_in_a_partial():
    def with_shift(shift, params, images):
        return function(params, images + shift)

    traces = 0

    @jax.jit
    def logits(model, images):
        nonlocal traces
        traces += 1
        return model(images).logits

    params = make_params()
    for shift in (jnp.float32(1), jnp.float32(2)):
        model = from_apply(jax.tree_util.Partial(with_shift, shift), params, IMAGES)
        np.testing.assert_allclose(
            logits(model, IMAGES), function(params, IMAGES + shift)[1], rtol=1e-5, atol=1e-6
        )
    assert traces == 1
    assert len(jax.tree.leaves(model)) == 4


def test_ambiguous_kernels_are_listed():
    params = make_params()
    params["auxiliary"] = {"w": params["head"]["w"] + 1, "b": params["head"]["b"]}
    with pytest.raises(ValueError, match=r"2 layers .*auxiliary/w \[4, 5\], head/w \[4, 5\]"):
        from_apply(function, params, IMAGES)
    assert from_apply(function, params, IMAGES, head="head").head.kernel == ("head", "w")
    with pytest.raises(ValueError, match=r"kernel auxiliary/w they lie in"):
        from_apply(function, params, IMAGES, head="auxiliary")


def test_a_missing_kernel_is_told():
    params = make_params((20,))
    with pytest.raises(ValueError, match=r"0 layers .*\[B, 5\].*: none$"):
        from_apply(function, params, IMAGES)


@pytest.mark.parametrize(
    "after",
    [
        jax.nn.softmax,
        jax.nn.log_softmax,
        lambda z: 1.03 * z,
        lambda z: z + 0.05,
        lambda z: z * jnp.nan,
    ],
)
def test_logits_that_are_something_else_are_refused(after):
    def changed(params, images):
        features, logits = function(params, images)
        return features, after(logits)

    with pytest.raises(ValueError, match=r"must be features @ kernel \+ bias .*head/w"):
        from_apply(changed, make_params(), IMAGES)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_arithmetic_is_accepted(dtype):
    def narrow(params, images):
        params, images = jax.tree.map(lambda x: x.astype(dtype), (params, images))
        return jax.tree.map(lambda x: x.astype(jnp.float32), function(params, images))

    outputs = from_apply(narrow, make_params(), IMAGES)(IMAGES)
    np.testing.assert_allclose(outputs.logits, function(make_params(), IMAGES)[1], atol=0.1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda f, z: z, r"return \(features, logits\), got"),
        (lambda f, z: (f, z, z), r"return \(features, logits\), got tuple of 3"),
        (lambda f, z: (f[:, :, None] * f[:, None], z), r"features .*\(8, 4, 4\)"),
        (lambda f, z: (f, z.sum()), r"logits .*\(\)"),
        (lambda f, z: (f, None), r"logits .*NoneType"),
    ],
)
def test_other_results_are_refused(result, message):
    with pytest.raises(ValueError, match=message):
        from_apply(lambda p, x: result(*function(p, x)), make_params(), IMAGES)
