import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.sharding import (
    batch_mesh,
    local_rows,
    map_batch,
    put_batch,
    put_shared,
    replicated,
    split_batch,
)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_gradients_of_shared_arrays_stay_each_examples_own(devices):
    mesh = batch_mesh(jax.devices()[:devices])
    shared = jax.device_put(jnp.arange(3.0), replicated(mesh))
    batch = jax.device_put(jnp.arange(24.0).reshape(8, 3), split_batch(mesh))

    def gradients(shared, batch):
        return jax.vmap(jax.grad(lambda w, x: (w * x).sum() ** 2), (None, 0))(shared, batch)

    result = jax.jit(map_batch(gradients, mesh))(shared, batch)
    expected = 2 * (np.asarray(batch) @ np.arange(3.0))[:, None] * np.asarray(batch)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_the_batch_is_split_and_the_rest_is_not():
    mesh = batch_mesh()
    assert mesh.size == 8
    shapes = []

    def record(shared, batch):
        shapes.append((shared.shape, batch.shape))
        return batch + shared.sum()

    jax.jit(map_batch(record, mesh))(jnp.ones(3), jnp.ones(16))
    assert shapes == [((3,), (2,))]


@pytest.mark.parametrize(("devices", "devices_per_copy"), [(1, 1), (2, 1), (8, 1), (8, 4)])
def test_rows_come_back_in_the_order_they_went(devices, devices_per_copy):
    # Devices out of order, as where the links between them ask for it.
    mesh = batch_mesh(jax.devices()[:devices][::-1], devices_per_copy=devices_per_copy)
    rows = {"images": np.arange(48, dtype=np.float32).reshape(16, 3), "labels": np.arange(16)}
    split = put_batch(mesh, {"images": rows["images"], "labels": rows["labels"].astype(np.int32)})
    assert all(len(array.addressable_shards) == devices for array in split.values())
    for name, array in split.items():
        np.testing.assert_array_equal(local_rows(array), rows[name])


LARGE = {
    "longest": np.ones((64, 512, 3), np.float32),
    "longest that is divisible": np.ones((40, 513), np.float32),
    "indivisible": np.ones((129, 129), np.float32),
    "small": np.ones((8, 64), np.float32),
}


def shapes_on_devices(array):
    return {shard.data.shape for shard in array.addressable_shards}


def test_every_device_gets_a_copy_of_what_is_shared():
    shared = put_shared(batch_mesh(), LARGE)
    assert all(shapes_on_devices(shared[name]) == {LARGE[name].shape} for name in LARGE)
    assert put_shared(batch_mesh(), {}) == {}


@pytest.mark.parametrize("size", [2, 8])
def test_a_group_of_devices_gets_a_copy_between_them(size):
    mesh = batch_mesh(devices_per_copy=size)
    assert mesh.size == 8
    shared = put_shared(mesh, LARGE)
    assert {name: shapes_on_devices(array) for name, array in shared.items()} == {
        "longest": {(64, 512 // size, 3)},
        "longest that is divisible": {(40 // size, 513)},
        "indivisible": {(129, 129)},
        "small": {(8, 64)},
    }
    for name, array in shared.items():
        np.testing.assert_array_equal(array, LARGE[name])


@pytest.mark.parametrize("size", [0, -2, 3, 16])
def test_groups_that_do_not_add_up(size):
    with pytest.raises(ValueError, match=f"8 devices cannot be divided into groups of {size} "):
        batch_mesh(devices_per_copy=size)
