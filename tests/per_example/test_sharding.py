"""The numbers do not depend on how many devices there are, nor on who splits the batch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gradnorm_jax.per_example import per_example_grad_norms, per_example_grads
from gradnorm_jax.sharding import batch_mesh, batch_sharding, map_batch, replicated
from tests.per_example import networks, reference

TOLERANCE = 2e-5


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loss_fn(params, batch):
    x = jnp.tanh(convolve(batch["image"], params["conv"]))
    x = convolve(x, jnp.tanh(params["point"])).mean(axis=(1, 2))
    return ((x @ params["head"] - batch["target"]) ** 2).sum(axis=1)


def network(batch=16):
    shapes = {"conv": (3, 3, 3, 4), "point": (1, 1, 4, 5), "head": (5, 6)}
    params = networks.draw(
        {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}, jnp.float32
    )
    target = networks.images(jnp.float32, 1, batch, 6)[:, 0, 0]
    images = networks.images(jnp.float32, 8, batch)
    return networks.Network(loss_fn, params, {"image": images, "target": target})


def explicit_mesh(devices):
    return jax.make_mesh(
        (len(devices),), ("batch",), axis_types=(AxisType.Explicit,), devices=devices
    )


def check(norms, batch=16, order=1):
    expected = reference.norms(reference.gradients(network(batch)), order)
    for path, value in expected.items():
        np.testing.assert_allclose(norms[path], value, rtol=TOLERANCE, err_msg=path)


@pytest.mark.parametrize("make_mesh", [batch_mesh, explicit_mesh])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("batch", [16, 13])
def test_mesh_is_given(make_mesh, devices, batch):
    mesh = make_mesh(jax.devices()[:devices])
    check(per_example_grad_norms(*network(batch), mesh=mesh), batch)
    check(per_example_grad_norms(*network(batch), mesh=mesh, microbatch_size=3), batch)


@pytest.mark.parametrize("make_mesh", [batch_mesh, explicit_mesh])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_mesh_of_the_arrays(make_mesh, devices):
    mesh = make_mesh(jax.devices()[:devices])
    fn, params, batch = network()
    params, batch = (
        jax.device_put(params, replicated(mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )
    norms = per_example_grad_norms(fn, params, batch)
    check(norms)
    assert len(norms["conv"].sharding.device_set) == devices


@pytest.mark.parametrize("make_mesh", [batch_mesh, explicit_mesh])
def test_mesh_of_the_context(make_mesh):
    with jax.set_mesh(make_mesh(jax.devices())):
        check(jax.jit(lambda p, b: per_example_grad_norms(loss_fn, p, b))(*network()[1:]))
        check(per_example_grad_norms(*network()))


def test_mesh_of_two_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    fn, params, batch = network()
    split = NamedSharding(mesh, PartitionSpec("data"))
    check(per_example_grad_norms(fn, params, jax.device_put(batch, split)))


@pytest.mark.parametrize("make_mesh", [batch_mesh, explicit_mesh])
@pytest.mark.parametrize("order", [1, 2])
def test_arrays_split_by_an_enclosing_jit(make_mesh, order):
    """Where `vmap(grad)` is silently wrong: nothing in the trace says that the batch is split."""
    mesh = make_mesh(jax.devices())
    fn, params, batch = network()
    params, batch = (
        jax.device_put(params, replicated(mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )
    check(
        jax.jit(lambda p, b: per_example_grad_norms(fn, p, b, ord=order))(params, batch),
        order=order,
    )


def test_the_trap_is_there():
    """Should this fail, JAX is mended, and what the engine does to stay clear of it can go."""
    mesh = batch_mesh()
    fn, params, batch = network()

    def loss(params, example):
        return fn(params, jax.tree.map(lambda x: x[None], example))[0]

    def norms(params, batch):
        gradients = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        return jax.tree.map(lambda g: jnp.abs(g).sum(axis=tuple(range(1, g.ndim))), gradients)

    with pytest.raises(AssertionError, match="conv"):
        check(jax.jit(norms)(params, jax.device_put(batch, batch_sharding(mesh))))


@jax.custom_vjp
def opaque(x, kernel):
    """A convolution that cannot be rewritten."""
    return convolve(x, kernel)


opaque.defvjp(lambda x, k: (convolve(x, k), (x, k)), lambda r, g: jax.vjp(convolve, *r)[1](g))


def opaque_loss(params, batch):
    x = opaque(batch["image"], params["conv"])
    return loss_fn({**params, "conv": jnp.zeros_like(params["conv"])}, batch) + (x**2).sum(
        axis=(1, 2, 3)
    )


def test_opaque_functions_split_by_an_enclosing_jit():
    """A convolution inside a function with its own derivative cannot be rewritten."""
    _, params, batch = network()
    expected = reference.norms(reference.gradients(networks.Network(opaque_loss, params, batch)), 1)
    batch = jax.device_put(batch, batch_sharding(batch_mesh()))
    with pytest.warns(UserWarning, match="gradients of conv"):
        norms = jax.jit(lambda p, b: per_example_grad_norms(opaque_loss, p, b))(params, batch)
    np.testing.assert_allclose(norms["conv"], expected["conv"], rtol=TOLERANCE)


@pytest.mark.filterwarnings("ignore::gradnorm_jax.per_example.FallbackWarning")
def test_batches_of_batches():
    """Examples that are done one after another, for several batches, of kernels made of more."""

    def scaled_loss(scale, bound, params, batch):
        x = opaque(batch["image"], params["conv"])
        scaled = {"point": scale * params["point"], "head": bound * params["head"]}
        return loss_fn(params | scaled, batch) + (x**2).sum(axis=(1, 2, 3))

    def norms(scale, batch):
        loss = jax.tree_util.Partial(lambda *rest: scaled_loss(scale, *rest), scale)
        return per_example_grad_norms(loss, params, batch)

    _, params, batch = network(2)
    scale, batches = jnp.float32(2), jax.tree.map(lambda x: jnp.stack([x, -x]), batch)
    found = jax.jit(jax.vmap(norms, (None, 0)))(scale, batches)
    loss = jax.tree_util.Partial(scaled_loss, scale, scale)
    expected = reference.norms(reference.gradients(networks.Network(loss, params, batch)), 1)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path][0], value, rtol=TOLERANCE, err_msg=path)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_map_over_devices(check_vma):
    mesh = batch_mesh()
    split = PartitionSpec(mesh.axis_names)

    def norms(params, batch):
        return per_example_grad_norms(loss_fn, params, batch)

    mapped = jax.shard_map(
        norms, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=check_vma
    )
    check(jax.jit(mapped)(*network()[1:]))
    check(jax.jit(map_batch(norms, mesh))(*network()[1:]))


def test_dense_layers_on_several_rows_inside_a_map_over_devices():
    def loss(params, batch):
        return jnp.sin(batch @ params).sum(axis=(1, 2))

    kernel, batch = jnp.linspace(-1, 1, 12).reshape(3, 4), networks.images(jnp.float32, 5, 8)[:, 0]
    split = PartitionSpec("batch")
    mapped = jax.shard_map(
        lambda p, b: per_example_grad_norms(loss, p, b)[""],
        mesh=batch_mesh(),
        in_specs=(PartitionSpec(), split),
        out_specs=split,
    )
    expected = per_example_grad_norms(loss, kernel, batch)[""]
    np.testing.assert_allclose(jax.jit(mapped)(kernel, batch), expected, rtol=1e-5)


def test_gradients_stay_split():
    mesh = batch_mesh()
    fn, params, batch = network(13)
    gradients = per_example_grads(fn, params, batch, mesh=mesh)
    expected = reference.gradients(network(13))
    for path, value in expected.items():
        np.testing.assert_allclose(gradients[path], value, rtol=1e-4, atol=1e-6)


def test_loops_with_convolutions_split_by_an_enclosing_jit():
    build = networks.scanned_convolutions(jnp.float32)
    batch = jnp.concatenate([build.batch, -build.batch])
    build = build._replace(batch=batch)
    expected = reference.norms(reference.gradients(build), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms = jax.jit(lambda p, b: per_example_grad_norms(build.loss_fn, p, b))(
            build.params, jax.device_put(batch, batch_sharding(batch_mesh()))
        )
    for path, value in expected.items():
        np.testing.assert_allclose(norms[path], value, rtol=TOLERANCE, err_msg=path)
