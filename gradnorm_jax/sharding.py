"""Meshes, and the one way in which work is split over devices.

Per-example gradients of convolutions come out silently wrong when the compiler partitions
`vmap(grad)` by itself, and replicated parameters inside `shard_map` have their gradients summed
over devices. `map_batch` avoids both: every device runs the function on its own slice of the batch,
with everything else whole. Nothing is communicated.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXIS = "batch"

Shared = TypeVar("Shared")
Batch = TypeVar("Batch")
Out = TypeVar("Out")


def batch_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over `devices`, by default all of this process, to split batches over."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays `[B, ...]` whose examples are spread over all axes of `mesh`."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


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
        number of devices.
    """
    split = PartitionSpec(mesh.axis_names)
    # check_vma=False: otherwise gradients of shared arrays would be summed over the devices.
    mapped: Callable[[Shared, Batch], Out] = jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )
    return mapped
