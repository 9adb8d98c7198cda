import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.sharding import batch_mesh, map_batch, put_batch, put_shared

LAYERS, SIZE = 8, 256
RNG = np.random.default_rng(0)
KERNELS = [RNG.normal(size=(SIZE, SIZE)).astype(np.float32) for _ in range(LAYERS)]
IMAGES = RNG.normal(size=(16, SIZE)).astype(np.float32)


def forward(kernels, images):
    """Layers with standardised kernels."""
    for kernel in kernels:
        kernel = kernel - kernel.mean(axis=0, keepdims=True)
        images = jnp.tanh(images @ (kernel / (16 * kernel.std(axis=0, keepdims=True))))
    return images


def backward(kernels, images):
    return jax.grad(lambda images: forward(kernels, images).sum())(images)


def of_each_example(kernels, images):
    def loss(kernels, image):
        return jax.nn.relu(forward(kernels, image[None])).sum()

    gradients = jax.vmap(jax.grad(loss), (None, 0))(kernels, images)
    return [jnp.abs(gradient).sum((1, 2)) for gradient in gradients]


def in_a_loop(kernels, images):
    def layer(images, kernel):
        return forward([kernel], images), None

    return jax.lax.scan(layer, images, jnp.stack(kernels))[0]


def of_kernels_alone(kernels, images):
    return jnp.broadcast_to(kernels[0].sum(axis=0, keepdims=True), images.shape), images


def compiled(function, devices_per_copy):
    mesh = batch_mesh(devices_per_copy=devices_per_copy)
    arguments = put_shared(mesh, KERNELS), put_batch(mesh, IMAGES)
    return jax.jit(map_batch(function, mesh)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize(
    "function",
    [
        forward,
        backward,
        of_each_example,
        in_a_loop,
        of_kernels_alone,
        jax.jit(forward),
        jax.checkpoint(forward),
    ],
)
@pytest.mark.parametrize("devices_per_copy", [2, 8])
def test_what_is_gathered_gives_the_same_numbers(function, devices_per_copy):
    whole, arguments = compiled(function, 1)
    expected = whole(*arguments)
    gathered, arguments = compiled(function, devices_per_copy)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        gathered(*arguments),
        expected,
    )


@pytest.mark.parametrize(
    ("function", "times"), [(forward, 1), (jax.jit(forward), 1), (backward, 2)]
)
def test_kernels_are_gathered_for_each_pass_after_the_operation_before(function, times):
    mesh = batch_mesh(devices_per_copy=8)
    program = jax.make_jaxpr(map_batch(function, mesh))(KERNELS, IMAGES)
    (sharded,) = program.eqns
    order = [equation.primitive.name for equation in sharded.params["jaxpr"].eqns]
    work = [name for name in order if name in ("all_gather", "dot_general")]
    assert work == ["all_gather", "dot_general"] * LAYERS * times


@pytest.mark.parametrize("function", [forward, jax.jit(forward), backward])
def test_there_need_be_room_for_one_layer_at_a_time(function):
    program, _ = compiled(function, 8)
    memory = program.memory_analysis()
    kernel = KERNELS[0].nbytes
    assert memory.argument_size_in_bytes < 1.1 * kernel * LAYERS / 8
    # The kernel, its standardised copy, and what the activations take.
    assert memory.temp_size_in_bytes < 2.5 * kernel
