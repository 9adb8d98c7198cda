"""Derivatives of per-example gradients and norms, forward and reverse, against plain JAX."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from gradnorm_jax.per_example import FallbackWarning, per_example_grad_norms, per_example_grads
from gradnorm_jax.tree import leaves_by_name
from tests.per_example import networks
from tests.per_example.test_agreement import assert_close


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def defined(network, reduce):
    """`reduce` of the gradients `[B, ...]` by path, of a function of parameters and batch."""

    def loss(params, example):
        return network.loss_fn(params, jax.tree.map(lambda x: x[None], example))[0]

    return lambda params, batch: {
        path: reduce(gradients)
        for path, gradients in leaves_by_name(
            jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        ).items()
    }


def squares(gradients):
    return (gradients**2).sum(axis=tuple(range(1, gradients.ndim)))


def total(function):
    return lambda *operands: sum(leaf.sum() for leaf in jax.tree.leaves(function(*operands)))


def draw_like(tree):
    return networks.draw(tree, jnp.float64, seed=7)


@pytest.mark.parametrize(
    "build",
    [
        networks.odd_convolutions,
        pytest.param(networks.remat, marks=pytest.mark.slow),
        pytest.param(networks.scanned_convolutions, marks=pytest.mark.slow),
    ],
)
def test_gradients_have_directional_derivatives(build, x64):
    network = build(jnp.float64)
    primals = network.params, network.batch
    tangents = draw_like(primals)

    def along(function):
        return jax.jit(lambda p, t: jax.jvp(function, p, t)[1])(primals, tangents)

    with_engine = along(lambda p, b: per_example_grads(network.loss_fn, p, b))
    assert_close(with_engine, along(defined(network, lambda g: g)), 1e-9)


@pytest.mark.parametrize("select", [pytest.param(None, marks=pytest.mark.slow), "dense"])
def test_hessians_of_2_norms(select, x64):
    """Forward over reverse and reverse over forward, along a direction."""
    network = networks.few_rows(jnp.float64)
    params, batch = network.params, network.batch
    direction = draw_like(params)

    def norms(params):
        norms = per_example_grad_norms(network.loss_fn, params, batch, ord=2, select=select)
        return {path: norm**2 for path, norm in norms.items()}

    def expected(params):
        everything = defined(network, squares)(params, batch)
        return {path: everything[path] for path in everything if select in (None, path)}

    def forward_over_reverse(function):
        return jax.jvp(jax.grad(total(function)), (params,), (direction,))[1]

    def reverse_over_forward(function):
        return jax.grad(lambda p: jax.jvp(total(function), (p,), (direction,))[1])(params)

    truth = leaves_by_name(jax.jit(lambda: forward_over_reverse(expected))())
    for way in (forward_over_reverse, reverse_over_forward):
        assert_close(leaves_by_name(jax.jit(lambda way=way: way(norms))()), truth, 1e-8)


def test_jacobians_with_frozen_convolutions(x64):
    """The gradient of the last layer, differentiated with respect to what lies below it."""
    network = networks.nnx_module(jnp.float64)

    def jacobian(function):
        return jax.jit(jax.jacfwd(function))(network.params, network.batch)

    def gradients(params, batch):
        return per_example_grads(network.loss_fn, params, batch, select="head/kernel")

    ((path, actual),) = jacobian(gradients).items()
    expected = jacobian(defined(network, lambda g: g))[path]
    assert_close(leaves_by_name(actual), leaves_by_name(expected), 1e-10)
