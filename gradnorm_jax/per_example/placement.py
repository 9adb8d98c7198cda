"""Which devices the examples of a batch are spread over, and how."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gradnorm_jax.sharding import map_batch

AnyMesh = Mesh | AbstractMesh


class Placement(NamedTuple):
    """Where a batch is computed.

    Attributes:
        mesh: its examples are split over these devices; None to leave them where they are.
        known: False if the compiler may split them as it likes.
    """

    mesh: AnyMesh | None
    known: bool


def find_placement(batch: Any, mesh: AnyMesh | None) -> Placement:
    """The mesh that is given, or ambient, or that of the arrays themselves, in this order.

    Inside `shard_map` the examples are already where they belong.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if mesh is None and ambient.manual_axes:
        return Placement(None, known=set(ambient.manual_axes) == set(ambient.axis_names))
    candidates = [mesh, ambient, *map(_mesh_of, jax.tree.leaves(batch))]
    for candidate in candidates:
        if candidate is not None and (candidate.size > 1 or _is_explicit(candidate)):
            return Placement(candidate, known=True)
    # A mesh that is given or ambient has one device, if it has come this far.
    has_mesh = mesh is not None or not ambient.empty
    on_one_device = has_mesh or all(map(_is_on_one_device, jax.tree.leaves(batch)))
    return Placement(None, known=on_one_device)


def spread(function: Callable[[Any, Any], Any], placement: Placement) -> Callable[[Any, Any], Any]:
    """`function(shared, batch)`, its batch of any size split over the devices of `placement`."""
    mesh = placement.mesh
    if mesh is None:
        return function

    def split(x: jax.Array) -> jax.Array:
        if len(x) % mesh.size:
            x = pad_batch(_reshard(x, mesh, PartitionSpec()), mesh.size)
        return _reshard(x, mesh, PartitionSpec(mesh.axis_names))

    def spread_function(shared: Any, batch: Any) -> Any:
        size = len(jax.tree.leaves(batch)[0])
        shared = jax.tree.map(lambda x: _reshard(x, mesh, PartitionSpec()), shared)
        results = map_batch(function, cast(Mesh, mesh))(shared, jax.tree.map(split, batch))
        if size % mesh.size:
            results = jax.tree.map(lambda x: _reshard(x, mesh, PartitionSpec())[:size], results)
        return results

    return spread_function


def pad_batch(batch: Any, multiple: int) -> Any:
    """The batch with its last example repeated until its size is a multiple of `multiple`."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.repeat(x[-1:], -len(x) % multiple, axis=0)])

    return jax.tree.map(pad, batch)


def zero_rows(batch: Any, mask: jax.Array | None) -> Any:
    """The batch with zeros in the rows that are false in `mask`, if there is one."""
    if mask is None:
        return batch

    def keep(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # PRNG keys: there is no zero
            return x
        rows = jnp.expand_dims(mask, tuple(range(1, x.ndim)))
        return jnp.where(rows, x, jnp.zeros_like(x))

    return jax.tree.map(keep, batch)


def as_varying(tree: Any) -> Any:
    """Inside `shard_map`, `tree` with a copy of its own on every device.

    Gradients with respect to arrays that all devices share would be summed over the devices.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _mesh_of(x: Any) -> AnyMesh | None:
    """The mesh that an array is known to be split over."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else _sharding(x)
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec):
        return None
    return sharding.mesh


def _is_on_one_device(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return jax.device_count() == 1
    return not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1


def _sharding(x: Any) -> Any:
    return x.sharding if isinstance(x, jax.Array) else None


def _reshard(x: jax.Array, mesh: AnyMesh, spec: PartitionSpec) -> jax.Array:
    """`x` spread by `spec` where the mesh leaves that to the program, not to the compiler."""
    if not _is_explicit(mesh):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def _is_explicit(mesh: AnyMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types
