"""Gram matrices of gradients, against the inner products of every example's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.per_example import gradient_gram, gram
from gradnorm_jax.sharding import batch_mesh
from tests.per_example import networks, reference
from tests.per_example.test_agreement import assert_close
from tests.per_example.test_options import network

SLOW = pytest.mark.slow


def expected(network, other):
    mine, theirs = reference.gradients(network), reference.gradients(network._replace(batch=other))
    return {
        path: np.einsum(
            "ip,jp->ij", *(np.reshape(x, (len(x), -1)) for x in (mine[path], theirs[path]))
        )
        for path in mine
    }


@pytest.mark.parametrize(
    "build",
    [
        networks.few_rows,
        pytest.param(networks.odd_convolutions, marks=SLOW),
        pytest.param(networks.vit, marks=SLOW),
        pytest.param(networks.embedding_tied_with_output, marks=SLOW),
    ],
)
def test_float64(build, x64):
    built = build(jnp.float64)
    other = jax.tree.map(lambda x: x[:2][::-1], built.batch)
    assert_close(gradient_gram(*built, other), expected(built, other), 1e-10)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 8])
def test_parts_on_several_devices(devices, x64, monkeypatch):
    """11 by 13 examples, 3 at a time on each device, one of them after the other."""
    monkeypatch.setattr(gram, "fast_memory", lambda: 1)
    everything = network(jnp.float64, 24)
    mine = everything._replace(batch=everything.batch[:11])
    mesh = batch_mesh(jax.devices()[:devices])
    other = everything.batch[11:]
    found = gradient_gram(*mine, other, microbatch_size=3 if devices < 8 else 1, mesh=mesh)
    assert_close(found, expected(mine, other), 1e-10)


@pytest.mark.parametrize("size", [None, pytest.param(3, marks=SLOW)])
def test_a_batch_with_itself(size, x64):
    everything = network(jnp.float64)
    found = gradient_gram(*everything, microbatch_size=size, mesh=batch_mesh(jax.devices()[:2]))
    assert_close(found, expected(everything, everything.batch), 1e-10)


@pytest.mark.parametrize("common", [0.0, 1e3])
def test_rows_that_are_alike(common):
    """Where cotangents add up to nothing, little is left of what the rows have in common."""
    x, g = (np.random.default_rng(i).normal(size=(3, 8, 64)) for i in range(2))
    x, g = np.float32(x + common), np.float32(g - g.mean(axis=1, keepdims=True))
    gradients = np.einsum("brk,bro->bko", np.float64(x), np.float64(g)).reshape(3, -1)
    factors = gram.centered(jnp.asarray(x), jnp.asarray(g))
    found = gram.inner_products(factors, factors, in_turn=False)
    largest = np.abs(gradients @ gradients.T).max()
    np.testing.assert_allclose(found, gradients @ gradients.T, rtol=1e-5, atol=1e-5 * largest)


def test_no_gradient_is_formed_where_rows_are_few():
    params, batch = {"kernel": jnp.ones((512, 1024))}, jnp.ones((16, 2, 512))
    loss = lambda p, x: jnp.tanh(x @ p["kernel"]).sum((1, 2))  # noqa: E731
    function = jax.jit(lambda p, b: gradient_gram(loss, p, b))
    memory = function.lower(params, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < params["kernel"].nbytes


def test_other_examples_must_be_alike():
    fn, params, batch = network(jnp.float32)
    with pytest.raises(ValueError, match=r"but for its size: .*float32\[4, 40\].*float32\[2, 40\]"):
        gradient_gram(fn, params, batch, batch[:, :2])
