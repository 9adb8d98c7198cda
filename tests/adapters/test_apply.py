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


def test_bias_is_the_vector_that_is_added():
    def scaled(params, images):
        features = images.reshape(8, 6)
        head = params["head"]
        return features, features @ head["kernel"] + head["bias"][None]

    head = {"kernel": jnp.ones((6, 5)), "bias": jnp.arange(5.0), "running_mean": jnp.ones(5)}
    model = from_apply(scaled, {"head": head}, IMAGES)
    assert model.head == Head(("head", "kernel"), ("head", "bias"))
    unclear = {"head": {"kernel": head["kernel"], "b": head["bias"], "c": head["running_mean"]}}
    model = from_apply(
        lambda p, x: (x.reshape(8, 6), x.reshape(8, 6) @ p["head"]["kernel"]), unclear, IMAGES
    )
    assert model.head == Head(("head", "kernel"))


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


def two_heads(params, images):
    features, logits = function(params, images)
    return {"main": logits, "auxiliary": features @ params["auxiliary"]["w"]}


def test_several_heads_are_listed():
    params = make_params()
    params["auxiliary"] = {"w": params["head"]["w"] + 1, "b": params["head"]["b"]}
    assert from_apply(function, params, IMAGES).head.kernel == ("head", "w")
    listed = r"2 entries .*output/auxiliary in auxiliary/w, output/main in head/w; .*logits=.*head="
    with pytest.raises(ValueError, match=listed):
        from_apply(two_heads, params, IMAGES)
    for cure in ({"head": "head"}, {"logits": lambda output: output["main"]}):
        model = from_apply(two_heads, params, IMAGES, **cure)
        assert model.head.kernel == ("head", "w")
        np.testing.assert_allclose(
            model(IMAGES).logits, two_heads(params, IMAGES)["main"], rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match=r"ends in a layer 'lost'; they end: .*head/w"):
        from_apply(two_heads, params, IMAGES, head="lost")


def test_a_kernel_of_another_shape_is_reshaped():
    model = from_apply(function, make_params((20,)), IMAGES)
    assert model.head.steps == (("reshape", (4, 5)),)
    assert head_parameters(model)[0].shape == (4, 5)


@pytest.mark.parametrize(
    ("after", "met"),
    [
        (jax.nn.softmax, "a softmax"),
        (jax.nn.log_softmax, "a log-softmax"),
        (lambda z: 1.03 * z, "a multiplication by a constant"),
        (lambda z: z / 2, "a division by a constant"),
        (lambda z: z + 0.05, "the addition of something other than a bias"),
        (lambda z: z * jnp.nan, "a multiplication by a constant"),
        (lambda z: -z, "a change of sign"),
        (lambda z: z[:, ::-1], "rev"),
        (lambda z: jnp.concatenate([z, z], 1), "a concatenation"),
    ],
)
def test_logits_that_are_something_else_are_refused(after, met):
    def changed(params, images):
        features, logits = function(params, images)
        return features, after(logits)

    where = rf"output/1 .*{met}.*test_apply\.py:\d+ in .*logits=lambda output.*find_head=False"
    with pytest.raises(ValueError, match=where):
        from_apply(changed, make_params(), IMAGES)


def test_features_are_not_taken_for_logits():
    """They end in a linear layer too, but the probabilities are computed from them."""

    def probabilities(params, images):
        features = images.reshape(8, -1) @ params["body"]["w"]
        return features, jax.nn.softmax(features @ params["head"]["w"])

    with pytest.raises(ValueError, match=r"output/0 \[8, 4\]: another entry .*output/1 .*softmax"):
        from_apply(probabilities, make_params(), IMAGES)


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
        (lambda f, z: z.sum(), r"\[8, C\].* returns the output \[\]"),
        (lambda f, z: {"a": z[:4], "b": "c"}, r"\[8, C\].* output/a \[4, 5\], output/b str"),
        (lambda f, z: None, r"\[8, C\].* returns nothing"),
    ],
)
def test_results_without_logits_are_refused(result, message):
    with pytest.raises(ValueError, match=message):
        from_apply(lambda p, x: result(*function(p, x)), make_params(), IMAGES)


@pytest.mark.parametrize(
    "result",
    [
        lambda f, z: z,
        lambda f, z: (f, z, z),
        lambda f, z: (f[:, :, None] * f[:, None], z),
        lambda f, z: {"logits": z[:, None, None], "none": None, "name": "a"},
    ],
)
def test_one_entry_of_the_result_is_enough(result):
    model = from_apply(lambda p, x: result(*function(p, x)), make_params(), IMAGES)
    expected_features, expected_logits = function(make_params(), IMAGES)
    features, logits = model(IMAGES)
    np.testing.assert_allclose(features, expected_features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-6)
