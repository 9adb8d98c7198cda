"""Selecting, reducing, microbatches, caching, costs and errors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.norms import entrywise_norm
from gradnorm_jax.per_example import (
    FallbackWarning,
    combine_norms,
    per_example_grad_norms,
    per_example_grads,
    per_example_reduce,
)
from tests.per_example import networks, reference


def perceptron(params, batch):
    hidden = jnp.tanh(batch @ params["body"]["first"] + params["body"]["bias"][None])
    return kl_to_uniform(hidden @ params["head"])


@pytest.fixture
def network():
    shapes = {"body": {"first": (6, 4), "bias": (4,)}, "head": (4, 3)}
    specs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    batch = networks.images(jnp.float32, 1, batch=5, channels=6)[:, 0, 0]
    return networks.Network(perceptron, networks.draw(specs, jnp.float32), batch)


def test_by_hand():
    """loss = x . w, whose gradient is x."""
    x = jnp.array([[3.0, -4.0], [0.0, 0.0]])
    norms = per_example_grad_norms(lambda w, x: x @ w, jnp.ones(2), x, ord=2)
    np.testing.assert_allclose(norms[""], [5, 0])


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, ["body/bias", "body/first", "head"]),
        ("head", ["head"]),
        ("body", ["body/bias", "body/first"]),
        ("body/*", ["body/bias", "body/first"]),
        ("*/f?rst", ["body/first"]),
        (["head", "body/bias"], ["body/bias", "head"]),
        (lambda path: path.endswith("t"), ["body/first"]),
    ],
)
def test_select(network, select, expected):
    norms = per_example_grad_norms(*network, select=select)
    assert list(norms) == expected
    everything = per_example_grad_norms(*network)
    for path in expected:
        np.testing.assert_allclose(norms[path], everything[path], rtol=1e-6)


@pytest.mark.parametrize("select", ["block4", ["head", "block4"], lambda path: False])
def test_a_selection_of_nothing_lists_what_there_is(network, select):
    with pytest.raises(ValueError, match="body/bias, body/first, head"):
        per_example_grad_norms(*network, select=select)


def test_a_long_list_of_parameters_is_shortened():
    params = {f"block{i}": {f"unit{j}": jnp.ones(2) for j in range(9)} for i in range(3)}
    with pytest.raises(ValueError, match=r"block0/\*, block1/\*, block2/\* \(27 leaves") as error:
        per_example_grad_norms(lambda p, x: x, params, jnp.ones(3), select="head")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_microbatches_change_nothing(network, size):
    norms = per_example_grad_norms(*network, microbatch_size=size)
    for path, expected in reference.norms(reference.gradients(network), 1).items():
        np.testing.assert_allclose(norms[path], expected, rtol=1e-5)


def test_reduce_sees_microbatches_of_one_leaf_at_a_time(network):
    seen = []
    basis = networks.images(jnp.float32, 1, 1, channels=24).reshape(24)

    def reduce(path, gradients):
        seen.append((path, gradients.shape))
        flat = gradients.reshape(len(gradients), -1)
        return {"largest": flat.max(axis=1), "along": flat @ basis[: flat.shape[1]]}

    reduced = per_example_reduce(*network, reduce=reduce, microbatch_size=2)
    assert set(seen) == {("body/first", (2, 6, 4)), ("body/bias", (2, 4)), ("head", (2, 4, 3))}
    for path, gradient in reference.gradients(network).items():
        flat = gradient.reshape(5, -1)
        np.testing.assert_allclose(reduced[path]["largest"], flat.max(axis=1), rtol=1e-5)
        along = flat @ np.asarray(basis[: flat.shape[1]])
        np.testing.assert_allclose(reduced[path]["along"], along, rtol=1e-4, atol=1e-6)


def test_examples_do_not_see_each_other(network):
    alone = per_example_grad_norms(network.loss_fn, network.params, network.batch[:1])
    spoilt = per_example_grad_norms(
        network.loss_fn, network.params, network.batch.at[1:].set(jnp.nan)
    )
    for path, norm in alone.items():
        np.testing.assert_allclose(spoilt[path][:1], norm, rtol=1e-6)
        assert np.isnan(spoilt[path][1:]).all()


def test_repeated_calls_trace_once(network):
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return network.loss_fn(params, batch)

    for _ in range(3):
        per_example_grad_norms(loss_fn, network.params, network.batch)
    assert len(traces) == 1
    jitted = jax.jit(lambda params, batch: per_example_grad_norms(loss_fn, params, batch))
    for _ in range(3):
        jitted(network.params, network.batch)
    assert len(traces) <= 2


def test_arrays_that_ride_in_the_loss_are_arguments_not_constants(network):
    traces = []

    def loss_fn(scale, params, batch):
        traces.append(1)
        return scale * network.loss_fn(params, batch)

    once, twice = (
        per_example_grad_norms(
            jax.tree_util.Partial(loss_fn, jnp.float32(scale)), network.params, network.batch
        )
        for scale in (1, 2)
    )
    assert len(traces) == 1
    np.testing.assert_allclose(twice["head"], 2 * once["head"], rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_the_head_alone_costs_a_forward_pass(order):
    loss_fn, params, batch = networks.densenet(jnp.float32)

    def flops(function):
        return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"]

    forward = flops(loss_fn)
    head = flops(lambda p, b: per_example_grad_norms(loss_fn, p, b, ord=order, select="Dense_0"))
    everything = flops(lambda p, b: per_example_grad_norms(loss_fn, p, b, ord=order))
    assert head < 1.02 * forward
    assert everything > 2 * forward


def test_a_dense_layer_forms_no_gradient():
    """The program's working memory is below one example's gradient."""
    params = {"kernel": jnp.ones((512, 1024)), "bias": jnp.ones(1024)}

    def loss_fn(params, batch):
        return kl_to_uniform(batch @ params["kernel"] + params["bias"][None])

    function = jax.jit(lambda p, b: per_example_grad_norms(loss_fn, p, b))
    memory = function.lower(params, jnp.ones((4, 512))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < params["kernel"].nbytes / 4


def test_a_loop_forms_no_gradients_of_all_turns():
    params = {"stack": jnp.ones((8, 128, 128))}

    def loss_fn(params, batch):
        x, _ = jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), batch, params["stack"])
        return kl_to_uniform(x.mean(axis=1))

    function = jax.jit(lambda p, b: per_example_grad_norms(loss_fn, p, b))
    memory = function.lower(params, jnp.ones((16, 2, 128))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * params["stack"].nbytes / 4


def test_cells_of_loops_warn_once_and_by_name():
    network = networks.lstm(jnp.float32)
    with pytest.warns(FallbackWarning) as caught:
        per_example_grads(*network)
    assert len(caught) == 1
    listed = str(caught[0].message).split("gradients of ")[1].split(", ")
    everything = list(reference.gradients(network))
    outside = ["Dense_0/kernel", "Dense_0/bias"]
    assert listed == [path for path in everything if path not in outside]


@pytest.mark.parametrize(
    "build", [networks.vit, networks.scanned_transformer, networks.odd_convolutions]
)
def test_everything_else_has_a_rule(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        per_example_grads(*build(jnp.float32))


def test_whole_norm_equals_norm_of_all_gradients(network):
    gradients = per_example_grads(*network)
    whole = jnp.concatenate([g.reshape(5, -1) for g in gradients.values()], axis=1)
    combined = combine_norms(per_example_grad_norms(*network, ord=3), ord=3)
    np.testing.assert_allclose(combined, entrywise_norm(whole, ord=3), rtol=1e-5)


def test_bad_orders_and_sizes_are_refused(network):
    with pytest.raises(ValueError, match="ord must be at least"):
        per_example_grad_norms(*network, ord=0.1)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        per_example_grad_norms(*network, microbatch_size=0)


def test_losses_of_the_wrong_shape_are_refused(network):
    def mean_loss(params, batch):
        return network.loss_fn(params, batch).mean()

    with pytest.raises(TypeError, match=r"must return real losses of shape \[B\]"):
        per_example_grads(mean_loss, network.params, network.batch)


def test_batches_of_unequal_leaves_are_refused(network):
    with pytest.raises(ValueError, match="all leaves of the batch"):
        per_example_grads(
            lambda p, b: perceptron(p, b["x"]),
            network.params,
            {"x": network.batch, "y": jnp.ones(3)},
        )


@pytest.mark.parametrize("rows", [1, 3])
def test_a_loss_that_prints(rows, capfd):
    def loss(params, batch):
        jax.debug.print("{}", batch.sum() + params["kernel"].sum())
        return jnp.sin(batch @ params["kernel"]).sum(axis=(1, 2))

    params, batch = {"kernel": jnp.ones((2, 3))}, jnp.ones((4, rows, 2))
    norms = per_example_grad_norms(loss, params, batch)
    jax.effects_barrier()
    expected = entrywise_norm(per_example_grads(loss, params, batch)["kernel"])
    np.testing.assert_allclose(norms["kernel"], expected, rtol=1e-6)
    assert f"{2.0 * rows + 6}" in capfd.readouterr().out


def test_complex_data_with_a_real_kernel(x64):
    def loss(params, batch):
        return jnp.abs(batch @ params["kernel"]).sum(axis=(1, 2))

    batch = jax.random.normal(jax.random.key(0), (4, 1, 3), jnp.complex128)
    network = networks.Network(loss, {"kernel": jnp.eye(3) + 0.5}, batch)
    for order in (1, 2):
        expected = reference.norms(reference.gradients(network), order)["kernel"]
        actual = per_example_grad_norms(*network, ord=order)["kernel"]
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_integer_data():
    def loss(params, batch):
        product = jax.lax.dot_general(
            batch, params["kernel"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return product.sum(axis=1)

    batch = jnp.asarray([[1, -2], [3, 4]], jnp.int8)
    norms = per_example_grad_norms(loss, {"kernel": jnp.ones((2, 3))}, batch)
    np.testing.assert_array_equal(norms["kernel"], [9.0, 21.0])


@pytest.mark.parametrize("rows", [1, 3])
def test_norms_have_the_type_of_their_parameter(rows, x64):
    def loss(params, batch):
        kernel = params["kernel"].astype(jnp.float32)
        return jnp.sin(batch.astype(jnp.float32) @ kernel).sum(axis=(1, 2))

    for dtype, expected in ((jnp.float64, jnp.float64), (jnp.bfloat16, jnp.float32)):
        params, batch = {"kernel": jnp.ones((2, 3), dtype)}, jnp.ones((4, rows, 2), jnp.float64)
        assert per_example_grad_norms(loss, params, batch)["kernel"].dtype == expected


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("reduce", [lambda path, g: g.sum(), lambda path, g: g.sum(0)])
def test_a_reduction_must_keep_the_examples(network, reduce, microbatch_size):
    with pytest.raises(TypeError, match=r"a row for each example; of the gradients .* it returned"):
        per_example_reduce(*network, reduce=reduce, microbatch_size=microbatch_size)


def test_what_cannot_be_differentiated_is_named(network):
    loss, params, batch = network
    with pytest.raises(TypeError, match="reduce must be a function"):
        per_example_reduce(*network, reduce=None)
    with pytest.raises(TypeError, match=r"must return real losses of shape \[B\], nothing beside"):
        per_example_grad_norms(lambda p, x: (loss(p, x), x), params, batch)
    with pytest.raises(TypeError, match="Parameter step has dtype int32 and is not differentiable"):
        per_example_grad_norms(loss, params | {"step": 3}, batch)
    with pytest.raises(ValueError, match=r"same path .* body/first"):
        per_example_grad_norms(loss, params | {"body/first": 1.0}, batch)
    with pytest.raises(ValueError, match="params has no leaves"):
        per_example_grad_norms(lambda p, x: x.sum(1), {}, batch)
