"""Sums of squared gradients, against the squares of every example's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.per_example import squared_gradient_sums
from gradnorm_jax.sharding import batch_mesh
from gradnorm_jax.tree import leaves_by_name
from tests.per_example import networks, reference

SLOW = pytest.mark.slow


def loss_fn(params, batch):
    """One row for each example: a product from the left, a convolution, a head made of a leaf."""
    x = lax.dot_general(params["left"], batch, (((1,), (1,)), ((), ()))).T
    x = lax.conv_general_dilated(
        jnp.tanh(x)[:, None, None], params["conv"], (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    x = (jnp.sin(x[:, 0, 0]) + params["bias"]).astype(batch.dtype)
    return kl_to_uniform(x @ params["head"].reshape(-1, 4).T) + (x @ jnp.tanh(params["made"]))[:, 0]


def network(dtype, batch=13):
    shapes = {"left": (6, 5), "conv": (1, 1, 6, 4), "bias": (4,), "head": (12,), "made": (4, 1)}
    x = networks.images(dtype, 1, batch, channels=5)[:, 0, 0]
    return networks.Network(loss_fn, networks.draw_shapes(shapes, dtype), x)


def expected(network, rows=slice(None)):
    return {path: (g[rows] ** 2).sum(0) for path, g in reference.gradients(network).items()}


def check(sums, expected, tolerance=1e-12):
    for path, found in leaves_by_name(sums).items():
        np.testing.assert_allclose(found, expected[path], rtol=tolerance, atol=1e-20, err_msg=path)


@pytest.mark.parametrize("build", [network, networks.few_rows])
def test_float64(build, x64):
    check(squared_gradient_sums(*build(jnp.float64)), expected(build(jnp.float64)))


@pytest.mark.parametrize("devices", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 8])
def test_parts_and_padding(devices, x64):
    """13 examples, 3 at a time on each of several devices, of which some are padding."""
    everything = network(jnp.float64)
    mask = np.arange(13) % 4 != 1
    spoilt = everything._replace(batch=everything.batch.at[~mask].set(jnp.nan))
    mesh = batch_mesh(jax.devices()[:devices])
    sums = squared_gradient_sums(*spoilt, mask=mask, microbatch_size=3, mesh=mesh)
    check(sums, expected(everything, mask))


@pytest.mark.slow
def test_fewer_examples_than_devices(x64):
    few = network(jnp.float64, 3)
    check(squared_gradient_sums(*few, mesh=batch_mesh()), expected(few))


def test_one_row_for_each_example_forms_no_gradient():
    params, batch = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}, jnp.ones((64, 256))

    def loss(params, batch):
        return kl_to_uniform(batch @ params["kernel"] + params["bias"])

    function = jax.jit(lambda p, b: squared_gradient_sums(loss, p, b, select="kernel"))
    memory = function.lower(params, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * params["kernel"].nbytes
    assert function(params, batch)["bias"] is None


def test_types_of_half_a_float_are_summed_in_float32():
    params, batch = {"kernel": jnp.ones((3, 2), jnp.bfloat16)}, jnp.ones((1000, 3), jnp.bfloat16)
    sums = squared_gradient_sums(lambda p, x: (x @ p["kernel"]).sum(1), params, batch)
    assert sums["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(sums["kernel"], 1000)
