"""Every kind of network, against the definition."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.convolution import lower_convolutions
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.norms import entrywise_norm
from gradnorm_jax.per_example import (
    FallbackWarning,
    combine_norms,
    layers,
    per_example_grad_norms,
    per_example_grads,
)
from gradnorm_jax.tree import leaves_by_name
from tests.per_example import networks, reference

SLOW = [networks.bit, networks.mobilenet, networks.densenet]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def assert_close(actual, expected, tolerance):
    """To a relative tolerance; what cancels to zero, to that of the largest entry of all."""
    largest = max(np.abs(value).max() for value in expected.values())
    assert list(actual) == list(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(
            actual[path], value, rtol=tolerance, atol=tolerance / 1e3 * largest, err_msg=path
        )


@pytest.mark.parametrize(
    "build", [pytest.param(b, marks=[pytest.mark.slow] * (b in SLOW)) for b in networks.ALL]
)
def test_float64(build, x64):
    network = build(jnp.float64)
    gradients = reference.gradients(network)
    assert_close(per_example_grads(*network), gradients, 1e-10)
    assert_close(per_example_grad_norms(*network), reference.norms(gradients, 1), 1e-10)


@pytest.mark.parametrize(
    "build", [pytest.param(b, marks=[pytest.mark.slow] * (b in SLOW)) for b in networks.ALL]
)
def test_float32(build):
    network = build(jnp.float32)
    with jax.enable_x64(True):
        gradients = reference.gradients(build(jnp.float64))
    for order in (1, 2):
        norms = per_example_grad_norms(*network, ord=order)
        assert_close(norms, reference.norms(gradients, order), 1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("name", networks.TABLE)
def test_networks_known_by_name(name, x64):
    network = networks.of_table(name, jnp.float64)
    gradients = reference.gradients(network)
    assert_close(per_example_grad_norms(*network), reference.norms(gradients, 1), 1e-10)


@pytest.mark.parametrize("order", [0.5, 2, 3.5, np.inf])
@pytest.mark.parametrize(
    "build", [networks.odd_convolutions, networks.vit, networks.embedding_tied_with_output]
)
def test_every_order(build, order, x64):
    network = build(jnp.float64)
    gradients = reference.gradients(network)
    norms = per_example_grad_norms(*network, ord=order)
    assert_close(norms, reference.norms(gradients, order), 1e-10)
    whole = np.concatenate([g.reshape(len(g), -1) for g in gradients.values()], axis=1)
    expected = reference.norms({"": whole}, order)[""]
    np.testing.assert_allclose(combine_norms(norms, ord=order), expected, rtol=1e-10)


@pytest.mark.parametrize("examples", [1, 2, 3, 12])
def test_gradients_of_a_few_examples_at_a_time(examples, x64, monkeypatch):
    monkeypatch.setattr(layers, "_examples_at_once", lambda entry: examples)
    network = networks.odd_convolutions(jnp.float64)
    # Nine, so that there are turns of three.
    network = network._replace(batch=jnp.concatenate([c * network.batch for c in (1, 2, -1)]))
    assert len(network.batch) % 2
    assert len(network.batch) == 9
    norms = per_example_grad_norms(*network)
    assert_close(norms, reference.norms(reference.gradients(network), 1), 1e-10)


def test_on_accelerators_all_examples_at_once(x64, monkeypatch):
    turns = []
    monkeypatch.setattr(layers, "in_turns", lambda *operands: turns.append(operands))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    network = networks.odd_convolutions(jnp.float64)
    norms = per_example_grad_norms(*network)
    assert_close(norms, reference.norms(reference.gradients(network), 1), 1e-10)
    assert not turns


def test_layers_that_differ_in_their_constants(x64):
    """Equal layers share the function that measures them; masks of their own make them unequal."""
    masks = np.random.default_rng(0).integers(0, 2, (3, 12, 12)).astype(float)
    params = networks.draw_shapes({f"dense{i}": (12, 12) for i in range(3)}, jnp.float64)

    def loss_fn(params, batch):
        x = batch
        for mask, kernel in zip(masks, params.values(), strict=True):
            x = jnp.tanh(x @ (mask * kernel))
        return kl_to_uniform(x.mean(axis=(1, 2)))

    network = networks.Network(loss_fn, params, networks.images(jnp.float64, channels=12))
    norms = per_example_grad_norms(*network)
    assert_close(norms, reference.norms(reference.gradients(network), 1), 1e-10)


def test_2_norms_from_gram_matrices(x64, monkeypatch):
    rows, product_norm = [], layers.product_norm

    def spy(x, g, *, ord):
        rows.append(len(x))
        return product_norm(x, g, ord=ord)

    monkeypatch.setattr(layers, "product_norm", spy)
    network = networks.few_rows(jnp.float64)
    norms = per_example_grad_norms(*network, ord=2)
    assert rows == [4, 4]
    assert_close(norms, reference.norms(reference.gradients(network), 2), 1e-10)


@pytest.mark.parametrize("common", [0.0, 100.0, 1e4])
def test_gram_matrices_of_rows_that_are_alike(common):
    """Where the cotangents add up to nothing, little is left of what the rows have in common."""
    x, g = (np.random.default_rng(i).normal(size=(49, 256)) for i in range(2))
    g = np.asarray(g - g.mean(axis=0), np.float32)
    x = np.asarray(x + common, np.float32)
    expected = np.linalg.norm(np.float64(x).T @ np.float64(g))
    np.testing.assert_allclose(layers.product_norm(x, g, ord=2), expected, rtol=1e-5)


@pytest.mark.parametrize("order", [1.5, 2])
def test_norms_have_derivatives(order, x64):
    network = networks.few_rows(jnp.float64)

    def defined(params, batch):
        def loss(params, example):
            return network.loss_fn(params, example[None])[0]

        gradients = leaves_by_name(jax.vmap(jax.grad(loss), (None, 0))(params, batch))
        return sum(entrywise_norm(g, ord=order).sum() for g in gradients.values())

    def measured(params, batch):
        norms = per_example_grad_norms(network.loss_fn, params, batch, ord=order)
        return sum(norm.sum() for norm in norms.values())

    actual, expected = (
        jax.jit(jax.grad(function, argnums=(0, 1)))(network.params, network.batch)
        for function in (measured, defined)
    )
    assert_close(leaves_by_name(actual), leaves_by_name(expected), 1e-8)


def test_convolutions_that_differ_by_platform(x64):
    """Of the depthwise ones, what is made for CPUs does not hide the kernel from the engine."""
    network = networks.odd_convolutions(jnp.float64)
    gradients = reference.gradients(network)
    network = network._replace(loss_fn=lower_convolutions(network.loss_fn))
    assert "platform_index" in str(jax.make_jaxpr(network.loss_fn)(network.params, network.batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert_close(per_example_grads(*network), gradients, 1e-10)
        assert_close(per_example_grad_norms(*network), reference.norms(gradients, 1), 1e-10)


def test_bfloat16_activations():
    """Against `vmap(grad)`: other orders of summation round activations to other bfloat16s."""
    network = networks.bit_in_bfloat16(jnp.float32)

    def loss(params, example):
        return network.loss_fn(params, example[None])[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(network.params, network.batch)
    expected = reference.norms(leaves_by_name(gradients), 1)
    for path, norm in per_example_grad_norms(*network).items():
        assert norm.dtype == jnp.float32
        np.testing.assert_allclose(norm, expected[path], rtol=1e-2, err_msg=path)
