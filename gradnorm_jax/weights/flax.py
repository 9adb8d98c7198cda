"""What Flax's training codebases save: msgpack files and Orbax's folders."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradnorm_jax.weights.stored import Checkpoint, Stored, flax_leaves, readable, stored_arrays

_METADATA = "_METADATA"


def open_msgpack(path: Path) -> Stored:
    """A file of `flax.serialization.to_bytes` or `flax.training.checkpoints`."""
    from flax import serialization

    with readable(path, "write it again with flax.serialization.to_bytes"):
        restored = serialization.msgpack_restore(path.read_bytes())
        if not isinstance(restored, Mapping):
            raise ValueError(f"a {type(restored).__name__} is no tree of arrays")
        return stored_arrays(_only_arrays(flax_leaves(restored)))


def open_orbax(path: Path) -> Stored:
    """A folder of Orbax: a checkpoint, or the step of a `CheckpointManager`."""
    import orbax.checkpoint as ocp
    from etils import epath

    folder = epath.Path(_find_item(path))
    handler = ocp.PyTreeCheckpointHandler()
    remedy = "save it again with Orbax"
    with readable(path, remedy):
        metadata: Any = handler.metadata(folder)
        leaves = flax_leaves(metadata.tree)
        headers = {
            name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            for name, leaf in leaves.items()
        }

    def read(keys: Iterable[str]) -> Checkpoint:
        wanted = {id(leaves[key]) for key in keys}
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        item = jax.tree.map(
            lambda leaf: leaf if id(leaf) in wanted else ocp.PLACEHOLDER, metadata.tree
        )
        with readable(path, remedy):
            restored = handler.restore(
                folder, args=ocp.args.PyTreeRestore(item=item, restore_args=as_arrays)
            )
        return flax_leaves(restored)

    return Stored(headers, read)


def _only_arrays(leaves: dict[str, Any]) -> dict[str, Any]:
    for name, leaf in leaves.items():
        if not isinstance(leaf, np.ndarray | np.generic):
            raise ValueError(f"{name} is of type {type(leaf).__name__} and no array")
    return leaves


def _find_item(path: Path) -> Path:
    """The folder that holds arrays: the path itself, or the one item of a step."""
    if (path / _METADATA).exists():
        return path
    items = sorted(each for each in path.iterdir() if (each / _METADATA).exists())
    if len(items) == 1:
        return items[0]
    steps = sorted(each.parent.parent.name for each in path.glob(f"*/*/{_METADATA}"))
    within = [each.name for each in items] or steps
    if within:
        raise ValueError(f"{path} holds several checkpoints, {', '.join(within)}: name one of them")
    raise ValueError(f"{path} is a folder, but not a checkpoint of Orbax: it has no {_METADATA}")
