import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradnorm_jax as gj
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.types import Head
from tests.adapters.zoo_linen import ConvolutionBeforePooling

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
FLAT = IMAGES.reshape(4, -1)[:, :8]
W = jax.random.normal(jax.random.key(1), (8, 5))


def test_a_convolution_before_pooling_has_exact_norms_all_the_same():
    network = ConvolutionBeforePooling()
    variables = network.init(jax.random.key(1), IMAGES)
    with pytest.raises(ValueError, match=r"pooling.*find_head=False.*gradnorm_of_parameters"):
        gj.from_linen(network, variables, IMAGES)
    model = gj.from_linen(network, variables, IMAGES, find_head=False)
    assert model.head is None
    features, logits = model(IMAGES)
    assert features is None
    expected = network.apply(variables, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gj.energy(logits), gj.energy(model(IMAGES).logits))

    def loss(kernel, image):
        params = {**variables["params"], "classes": variables["params"]["classes"] | kernel}
        return kl_to_uniform(network.apply({"params": params}, image[None]))[0]

    kernel = {"kernel": variables["params"]["classes"]["kernel"]}
    gradients = jax.vmap(jax.grad(loss), (None, 0))(kernel, IMAGES)["kernel"]
    actual = gj.gradnorm_of_parameters(model, IMAGES, select="classes/kernel")
    np.testing.assert_allclose(actual, jnp.abs(gradients).sum(axis=(1, 2, 3, 4)), rtol=1e-5)


def test_without_a_head_in_the_other_adapters():
    def function(params, images):
        return jax.nn.softmax(images @ params["w"])

    model = gj.from_apply(function, {"w": W}, FLAT, find_head=False)
    np.testing.assert_allclose(model(FLAT).logits, function({"w": W}, FLAT), rtol=1e-6)
    network = nnx.Sequential(nnx.Linear(8, 5, rngs=nnx.Rngs(0)), nnx.softmax)
    model = gj.from_nnx(network, FLAT, find_head=False)
    np.testing.assert_allclose(model(FLAT).logits, network(FLAT), rtol=1e-6)
    with pytest.raises(ValueError, match=r"2 matrices: output/0 \[4, 5\], output/1 .*logits="):
        gj.from_apply(lambda p, x: (x @ p, x), W, FLAT, find_head=False)
    for pick in (0, 1):
        model = gj.from_apply(
            lambda p, x: (x @ p, x), W, FLAT, find_head=False, logits=lambda out, i=pick: out[i]
        )
        assert model(FLAT).logits.shape == (4, (5, 8)[pick])


def cosine(params, images):
    features = images / jnp.linalg.norm(images, axis=1, keepdims=True)
    kernel = params["w"] / jnp.linalg.norm(params["w"], axis=0, keepdims=True)
    return features @ kernel


def looped(params, images):
    return jax.lax.scan(lambda x, w: (x @ w, None), images, jnp.stack([params["v"]] * 2))[0]


REFUSED = {
    "a kernel that is computed, by div.* in cosine, from the parameters w": cosine,
    "something that depends on the images": lambda p, x: (x @ p["w"]) * x[:, :1],
    "a parameter .a learned scale": lambda p, x: (x @ p["w"]) / p["t"],
    "a division by a constant": lambda p, x: (x @ p["w"]) / 0.1,
    "a sum of two layers' outputs": lambda p, x: x @ p["w"] + jnp.tanh(x) @ p["w"],
    "a second bias": lambda p, x: x @ p["w"] + p["b"][None] + p["b"][None],
    "a loop": looped,
    "two factors that both depend": lambda p, x: x @ x.T,
    "no result": lambda p, x: x,
    "not among the params": lambda p, x: x @ W,
    "a slice": lambda p, x: (x @ p["v"])[:, :5],
    "a sum over positions": lambda p, x: (x.reshape(4, 2, 4) @ p["w"][:4]).sum(1),
    "a maximum .a ReLU": lambda p, x: jnp.maximum(x @ p["w"], 0),
    "more than one row": lambda p, x: (x.reshape(4, 2, 4) @ p["half"]).reshape(4, 10),
}


@pytest.mark.parametrize("met", REFUSED)
def test_what_is_no_linear_head_is_refused_in_words(met):
    params = {"w": W, "v": jnp.eye(8), "b": jnp.ones(5), "t": jnp.float32(2), "half": W[:4]}
    with pytest.raises(ValueError, match=met) as caught:
        gj.from_apply(REFUSED[met], params, FLAT)
    if met != "no result":
        assert "test_find_head.py:" in str(caught.value)
        assert "find_head=False" in str(caught.value)


def bfloat16(params, images):
    return (images.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)


@jax.custom_vjp
def own_derivative(params, images):
    return images @ params["w"]


own_derivative.defvjp(lambda p, x: (x @ p["w"], (p, x)), lambda r, g: (r[0], r[1]))

ACCEPTED = {
    "transposed": (lambda p, x: x @ p["wt"].T, Head(("wt",), steps=(("transpose", (1, 0)),))),
    "transposed product": (
        lambda p, x: (p["wt"] @ x.T).T,
        Head(("wt",), steps=(("transpose", (1, 0)),)),
    ),
    "einsum": (
        lambda p, x: jnp.einsum("bd,cd->bc", x, p["wt"]),
        Head(("wt",), steps=(("transpose", (1, 0)),)),
    ),
    "twice transposed": (lambda p, x: jnp.einsum("bd,cd->bc", x, p["w"].T), Head(("w",))),
    "vmap": (
        lambda p, x: jax.vmap(lambda row: p["wt"] @ row + p["b"])(x),
        Head(("wt",), ("b",), (("transpose", (1, 0)),)),
    ),
    "bias first": (lambda p, x: p["b"][None] + x @ p["w"], Head(("w",), ("b",))),
    "bias spread": (
        lambda p, x: jnp.broadcast_to(p["b"], (len(x), 5)) + x @ p["w"],
        Head(("w",), ("b",)),
    ),
    "cast": (bfloat16, Head(("w",))),
    "jit": (jax.jit(lambda p, x: jax.jit(lambda z: z.reshape(-1, 5))(x @ p["w"])), Head(("w",))),
    "remat": (jax.checkpoint(lambda p, x: jnp.tanh(x) @ p["w"]), Head(("w",))),
    "own derivative": (own_derivative, Head(("w",))),
    "barrier": (
        lambda p, x: jax.lax.optimization_barrier((x, x @ p["w"]))[1],
        Head(("w",)),
    ),
    "low rank": (
        lambda p, x: x @ p["w"] + x @ p["A"] @ p["B"] + p["b"][None],
        Head(("w",), ("b",), low_rank=(("A",), ("B",))),
    ),
    "unit axes": (lambda p, x: (x[:, None, None] @ p["w"])[:, 0, 0], Head(("w",))),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("rows", [1, 5])
def test_ways_to_write_a_linear_head(name, rows):
    function, head = ACCEPTED[name]
    a, b = jax.random.normal(jax.random.key(2), (2, 8, 2))
    params = {"w": W, "wt": W.T, "b": jnp.arange(5.0), "A": a, "B": b[:5].T}
    images = jnp.concatenate([FLAT, FLAT[:1]])[:rows]
    model = gj.from_apply(function, params, images)
    assert model.head == head
    features, logits = model(FLAT)
    kernel, bias = gj.head_parameters(model)
    own = function(params, FLAT)
    tolerance = 0.05 if name == "cast" else 1e-5
    np.testing.assert_allclose(logits, own, rtol=tolerance, atol=tolerance)
    expected = features.astype(jnp.float32) @ kernel
    expected += 0 if bias is None else jnp.broadcast_to(bias, expected.shape)
    np.testing.assert_allclose(own, expected, rtol=tolerance, atol=tolerance)


def test_recomputation_and_own_derivatives_stay():
    @jax.custom_vjp
    def doubled_gradient(x):
        return jnp.sin(x)

    doubled_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))

    def function(params, images):
        inner = jax.checkpoint(lambda v, x: doubled_gradient(x @ v))
        return inner(params["v"], images) @ params["w"]

    params = {"w": W, "v": jnp.eye(8)}
    model = gj.from_apply(function, params, FLAT)
    loss = lambda params: kl_to_uniform(model.apply(params, FLAT).logits).sum()  # noqa: E731
    own = jax.grad(lambda params: kl_to_uniform(function(params, FLAT)).sum())(params)
    actual = jax.grad(loss)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, own)
    assert "remat" in str(jax.make_jaxpr(loss)(params))


def test_the_whole_network_is_recomputed_if_it_says_so():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, images):
            return nn.Dense(5, name="head")(nn.tanh(nn.Dense(6)(images)))

    network = nn.remat(Body)()
    variables = network.init(jax.random.key(0), FLAT)
    model = gj.from_linen(network, variables, FLAT)
    np.testing.assert_allclose(
        model(FLAT).logits, network.apply(variables, FLAT), rtol=1e-5, atol=1e-6
    )
    assert "remat" in str(jax.make_jaxpr(model.apply)(model.params, FLAT))
    assert model(FLAT).features.shape == (4, 6)


def test_leaves_that_are_no_arrays_are_named():
    with pytest.raises(TypeError, match=r"must be arrays, .* at \['act'\].*eqx.partition"):
        gj.from_apply(lambda p, x: x @ p["w"], {"w": W, "act": jnp.tanh.__call__}, FLAT)
