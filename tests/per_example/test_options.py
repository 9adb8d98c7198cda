"""Several orders at once, results as trees, and rows of padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.per_example import (
    combine_norms,
    per_example_grad_norms,
    per_example_grads,
    per_example_reduce,
)
from gradnorm_jax.sharding import batch_mesh
from tests.per_example import networks

ORDERS = (2, math.inf)


def loss_fn(params, batch):
    """A layer on four rows, for which a Gram matrix pays; a bias; a head on one row."""
    hidden = jnp.tanh(batch @ params["body"]["kernel"] + params["body"]["bias"])
    return kl_to_uniform(hidden.sum(axis=1) @ params["head"])


def network(dtype, batch=5):
    shapes = {"body": {"kernel": (40, 30), "bias": (30,)}, "head": (30, 3)}
    x = networks.images(dtype, 4, batch, channels=40)[:, 0]
    return networks.Network(loss_fn, networks.draw_shapes(shapes, dtype), x)


@pytest.mark.parametrize(
    "build", [network, pytest.param(networks.scanned_transformer, marks=pytest.mark.slow)]
)
def test_several_orders_are_those_asked_for_one_by_one(build, x64):
    built = build(jnp.float64)
    one_by_one = [per_example_grad_norms(*built, ord=order) for order in ORDERS]
    norms = per_example_grad_norms(*built, ord=ORDERS)
    for path, found in norms.items():
        expected = np.stack([each[path] for each in one_by_one], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    for i, order in enumerate(ORDERS):
        whole = combine_norms(one_by_one[i], ord=order)
        np.testing.assert_allclose(combine_norms(norms, ord=ORDERS)[:, i], whole, rtol=1e-12)


def products(order):
    """How many products of matrices there are in the program of some norms."""
    norms = jax.make_jaxpr(lambda p, x: per_example_grad_norms(loss_fn, p, x, ord=order))
    return str(norms(*network(jnp.float32)[1:])).count("dot_general")


def test_gradients_are_formed_once_for_all_orders():
    assert products((1, 3, 0.5)) == products(1)
    assert products((1, 2)) == products(1)
    assert products([2]) == products(2) > products(1)


def test_results_as_a_tree():
    fn, params, batch = network(jnp.float32)
    by_path = per_example_grad_norms(fn, params, batch, select="*kernel", ord=2)
    tree = per_example_grad_norms(fn, params, batch, select="*kernel", ord=2, as_tree=True)
    expected = {"body": {"kernel": by_path["body/kernel"], "bias": None}, "head": None}
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    gradients = per_example_grads(fn, params, batch, as_tree=True)
    jax.tree.map(lambda g, p: np.testing.assert_equal(g.shape, (5, *p.shape)), gradients, params)
    sums = per_example_reduce(
        fn, params, batch, reduce=lambda path, g: (g.sum(-1), g[:, 0]), as_tree=True, select="head"
    )
    np.testing.assert_array_equal(sums["head"][1], gradients["head"][:, 0])


@pytest.mark.slow
def test_trees_of_modules():
    fn, params, batch = networks.nnx_module(jnp.float32)
    tree = per_example_grad_norms(fn, params, batch, select="head", as_tree=True)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(tree)) == [(3,), (3,)]


def largest_at(path, gradients):
    return {"at": gradients.reshape(len(gradients), -1).argmax(axis=1)}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (per_example_grad_norms, {"mesh": batch_mesh}),
        pytest.param(per_example_grads, {}, marks=pytest.mark.slow),
        pytest.param(
            per_example_reduce,
            {"reduce": largest_at, "microbatch_size": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_padding_is_zero_and_changes_nothing(function, options):
    if "mesh" in options:
        options = options | {"mesh": options["mesh"](jax.devices()[:2])}
    fn, params, batch = network(jnp.float32)
    spoilt = batch.at[1].set(jnp.nan).at[3:].set(jnp.inf)
    mask = np.array([True, False, True, False, False])
    expected = function(fn, params, batch, **options)
    expected = jax.tree.map(lambda x: x.at[~mask].set(0), expected)
    found = function(fn, params, spoilt, mask=mask, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_derivatives_do_not_see_padding():
    fn, params, batch = network(jnp.float32)

    def total(params, batch, mask):
        return combine_norms(per_example_grad_norms(fn, params, batch, mask=mask)).sum()

    spoilt = batch.at[3:].set(jnp.nan)
    found = jax.grad(total)(params, spoilt, jnp.arange(5) < 3)
    expected = jax.grad(total)(params, batch[:3], None)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected
    )


@pytest.mark.parametrize("mask", [jnp.ones(5), jnp.ones(4, bool), True, jnp.ones((5, 1), bool)])
def test_bad_masks_are_refused(mask):
    with pytest.raises(ValueError, match=r"mask must be bool, .* of shape \(5,\), got"):
        per_example_grad_norms(*network(jnp.float32), mask=mask)
