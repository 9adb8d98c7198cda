"""Meshes and the one way in which work is split over devices, those of other hosts included.

Per-example gradients of convolutions come out silently wrong when the compiler partitions
`vmap(grad)` by itself, and replicated parameters inside `shard_map` have their gradients summed
over devices. `map_batch` avoids both: every device runs the function on its own slice of the batch,
with its own copy of everything else, and nothing is communicated.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXIS = "batch"

Tree = TypeVar("Tree")
Shared = TypeVar("Shared")
Batch = TypeVar("Batch")
Out = TypeVar("Out")


def batch_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` (default: all) whose axis splits the batch."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices
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


def put_replicated(mesh: Mesh, tree: Tree) -> Tree:
    """A full copy of every array of `tree`, which is the same on all hosts, for each device."""
    sharding = replicated(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)  # without a copy where there is one already
    return jax.make_array_from_process_local_data(sharding, tree)


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
        number of devices. `shared` is replicated.
    """
    split = PartitionSpec(mesh.axis_names)
    # check_vma=False: otherwise gradients of replicated arrays would be summed over the devices.
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )
