import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.sharding import (
    batch_mesh,
    local_rows,
    map_batch,
    put_batch,
    put_replicated,
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


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rows_come_back_in_the_order_they_went(devices):
    # Devices out of order, as where the links between them ask for it.
    mesh = batch_mesh(jax.devices()[:devices][::-1])
    rows = {"images": np.arange(48, dtype=np.float32).reshape(16, 3), "labels": np.arange(16)}
    split = put_batch(mesh, {"images": rows["images"], "labels": rows["labels"].astype(np.int32)})
    assert all(len(array.addressable_shards) == devices for array in split.values())
    for name, array in split.items():
        np.testing.assert_array_equal(local_rows(array), rows[name])


def test_every_device_gets_all_of_what_is_replicated():
    mesh = batch_mesh()
    (array,) = put_replicated(mesh, [np.arange(3.0, dtype=np.float32)])
    assert [shard.data.shape for shard in array.addressable_shards] == [(3,)] * 8
    assert put_replicated(mesh, {}) == {}
