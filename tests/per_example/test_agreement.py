"""Every kind of network, against the definition."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.per_example import (
    FallbackWarning,
    combine_norms,
    per_example_grad_norms,
    per_example_grads,
)
from gradnorm_jax.per_example.selection import leaves_by_path
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


@pytest.mark.parametrize("build", [networks.bit, networks.odd_convolutions, networks.vit])
def test_float32(build):
    network = build(jnp.float32)
    with jax.enable_x64(True):
        gradients = reference.gradients(build(jnp.float64))
    for order in (1, 2):
        norms = per_example_grad_norms(*network, ord=order)
        assert_close(norms, reference.norms(gradients, order), 1e-5)


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


def test_bfloat16_activations():
    """Against `vmap(grad)`: other orders of summation round activations to other bfloat16s."""
    network = networks.bit_in_bfloat16(jnp.float32)

    def loss(params, example):
        return network.loss_fn(params, example[None])[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(network.params, network.batch)
    expected = reference.norms(leaves_by_path(gradients), 1)
    for path, norm in per_example_grad_norms(*network).items():
        assert norm.dtype == jnp.float32
        np.testing.assert_allclose(norm, expected[path], rtol=1e-2, err_msg=path)
