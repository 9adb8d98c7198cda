import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from gradnorm_jax.sharding import batch_mesh, batch_sharding, map_batch, replicated


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_gradients_of_shared_arrays_stay_each_examples_own(devices):
    mesh = batch_mesh(jax.devices()[:devices])
    shared = jax.device_put(jnp.arange(3.0), replicated(mesh))
    batch = jax.device_put(jnp.arange(24.0).reshape(8, 3), batch_sharding(mesh))

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
    split = jax.device_put(rows, batch_sharding(mesh))
    assert all(len(array.addressable_shards) == devices for array in split.values())
    for name, array in split.items():
        np.testing.assert_array_equal(array, rows[name])


def test_the_batch_is_split_over_all_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    batch = jax.device_put(np.arange(16.0, dtype=np.float32), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
    shapes = []

    def double(shared, batch):
        shapes.append(batch.shape)
        return shared * batch

    doubled = jax.jit(map_batch(double, mesh))(jnp.float32(2), batch)
    np.testing.assert_array_equal(doubled, 2 * np.arange(16))
    assert shapes == [(2,)]
