"""Meshes and the one way in which work is split over devices, those of other hosts included.

Per-example gradients of convolutions come out silently wrong when the compiler partitions
`vmap(grad)` by itself, and replicated parameters inside `shard_map` have their gradients summed
over devices. `map_batch` avoids both: every device runs the function on its own slice of the batch,
with everything else whole. Nothing is communicated but what is shared, where devices have no room
for a copy each.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gradnorm_jax.gathering import gather_late

BATCH_AXIS = "batch"
COPY_AXIS = "copy"
"""Devices along this axis of a mesh hold one copy of what is shared between them."""

_SMALL = 2**16
"""Bytes below which an array is not worth a gather each time it is used."""

Tree = TypeVar("Tree")
Shared = TypeVar("Shared")
Batch = TypeVar("Batch")
Out = TypeVar("Out")


def batch_mesh(devices: Sequence[jax.Device] | None = None, *, devices_per_copy: int = 1) -> Mesh:
    """A mesh over `devices` (default: all) that splits the batch over all of them.

    Args:
        devices: where to compute.
        devices_per_copy: how many of them hold a copy of what is shared between them; see
            `put_shared`.

    Raises:
        ValueError: the devices cannot be divided into groups of that size.
    """
    devices = jax.devices() if devices is None else devices
    copies, rest = divmod(len(devices), max(devices_per_copy, 1))
    if rest or devices_per_copy < 1:
        raise ValueError(
            f"{len(devices)} devices cannot be divided into groups of {devices_per_copy} that hold "
            f"a copy each; give a number that divides {len(devices)}"
        )
    return jax.make_mesh(
        (copies, devices_per_copy),
        (BATCH_AXIS, COPY_AXIS),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays `[B, ...]` whose examples are spread over all axes of `mesh`."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, rows: Tree) -> Tree:
    """Arrays `[B, ...]` split over `mesh`, of which every host gives its own rows.

    Args:
        mesh: the devices; each host has equally many of them.
        rows: pytree of arrays `[B / hosts, ...]`. Which rows of the whole they become follows from
            where the host's devices are in the mesh.
    """
    return jax.make_array_from_process_local_data(split_batch(mesh), rows)


def put_shared(mesh: Mesh, tree: Tree) -> Tree:
    """Arrays that all examples share, one copy for each group of devices along `COPY_AXIS`.

    With an axis of size k, each array is cut into k along its longest dimension that k divides, so
    that a device holds a k-th of it. Arrays of less than 64 KiB, and those without such a
    dimension, are on every device. Arrays of NumPy go from the host to each device piece by piece.

    Args:
        mesh: the devices; without `COPY_AXIS` each has a copy of its own.
        tree: pytree of arrays, the same on all hosts.
    """
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, _shared_spec(mesh, x))), tree)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)  # without a copy where there is one already
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _shared_spec(mesh: Mesh, array: Any) -> PartitionSpec:
    size = mesh.shape.get(COPY_AXIS, 1)
    shape = np.shape(array)
    dimensions = [d for d, length in enumerate(shape) if length % size == 0]
    if size == 1 or not dimensions or math.prod(shape) * array.dtype.itemsize < _SMALL:
        return PartitionSpec()
    longest = max(dimensions, key=lambda d: shape[d])
    return PartitionSpec(*[None] * longest, COPY_AXIS)


def local_rows(array: jax.Array) -> np.ndarray:
    """This host's rows of an array `[B, ...]` split over a mesh, in the order of `put_batch`."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def map_batch(
    function: Callable[[Shared, Batch], Out], mesh: Mesh
) -> Callable[[Shared, Batch], Out]:
    """`function(shared, batch)` with the batch split over the devices of `mesh`.

    Args:
        function: pure; maps a pytree `shared` and a pytree `batch` of arrays `[B, ...]` to a pytree
            of arrays `[B, ...]`, each example by itself. It is called with B / devices examples.
        mesh: the devices; every axis splits the batch.

    Returns:
        A function of the same signature, to be used under `jax.jit`. B must be a multiple of the
        number of devices. `shared` is as `put_shared` leaves it; `function` sees whole arrays,
        gathered as `gather_late` does where they are split.
    """
    split = PartitionSpec(mesh.axis_names)

    def mapped(shared: Shared, batch: Batch) -> Out:
        specs = jax.tree.map(functools.partial(_shared_spec, mesh), shared)
        local = function
        if mesh.shape.get(COPY_AXIS, 1) > 1:
            local = gather_late(function, jax.tree.map(_gather_along, specs))
        # check_vma=False: otherwise gradients of shared arrays would be summed over the devices.
        mapped_function: Callable[[Shared, Batch], Out] = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, split), out_specs=split, check_vma=False
        )
        return mapped_function(shared, batch)

    return mapped


def _gather_along(spec: PartitionSpec) -> Callable[[jax.Array], jax.Array]:
    if COPY_AXIS not in spec:
        return lambda array: array
    return functools.partial(
        jax.lax.all_gather, axis_name=COPY_AXIS, axis=tuple(spec).index(COPY_AXIS), tiled=True
    )
