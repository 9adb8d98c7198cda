"""The one door to weights files: which reader takes a file, and how arrays are written."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradnorm_jax.extras import needs_extra
from gradnorm_jax.weights.flax import open_msgpack, open_orbax
from gradnorm_jax.weights.npz import open_npz
from gradnorm_jax.weights.safetensors import open_safetensors
from gradnorm_jax.weights.stored import Checkpoint, Stored, plain_names
from gradnorm_jax.weights.torch import open_torch
from gradnorm_jax.whole_files import written_whole

READERS: Mapping[str, Callable[[Path], Stored]] = {
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".msgpack": open_msgpack,
    ".pt": open_torch,
    ".pth": open_torch,
    ".th": open_torch,
    ".ckpt": open_torch,
    ".tar": open_torch,
}
"""Who reads which files. Orbax's checkpoints are folders."""


def read_checkpoint(
    path: str | os.PathLike[str],
    check: Callable[[Mapping[str, jax.ShapeDtypeStruct]], None] | None = None,
) -> Checkpoint:
    """All weights in a file, or a folder of Orbax, by the names that layouts know them by.

    See `gradnorm_jax.weights.stored.plain_names` for these names, and `READERS` for the files.

    Args:
        path: the file.
        check: raises ValueError for shapes and types by name that are not wanted, before anything
            but headers is read, where the format allows it.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: a package of an extra is needed to read it.
        ValueError: another kind of file, or a broken one, or one that holds pickled objects, which
            are never loaded, or what `check` raises.
    """
    stored = _open(Path(path))
    names = plain_names(stored.headers)
    if check is not None:
        check({name: stored.headers[key] for name, key in names.items()})
    arrays = stored.read(names.values())
    return {name: arrays[key] for name, key in names.items()}


def write_checkpoint(path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Writes arrays by key to a `.safetensors` or `.npz` file, whole or not at all.

    Raises:
        ValueError: the path ends in neither.
    """
    path = Path(path)
    write = _WRITERS.get(path.suffix)
    if write is None:
        raise ValueError(
            f"weights are written as .safetensors or .npz, got {path}; end the path in one of them"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copied where need be: the order in memory of a transposed array is not that of its shape.
    arrays = {key: np.ascontiguousarray(array) for key, array in checkpoint.items()}
    with written_whole(path) as temporary:
        write(temporary, arrays)


def _open(path: Path) -> Stored:
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {path}; give the path of an existing file")
    if path.is_dir():
        return open_orbax(path)
    if re.fullmatch(r"checkpoint_\d+", path.name):
        return open_msgpack(path)  # what flax.training.checkpoints calls its files
    if path.suffix.lower() not in READERS:
        raise ValueError(
            f"cannot read weights from {path}; known are {', '.join(READERS)} and folders of Orbax"
        )
    return READERS[path.suffix.lower()](path)


def _write_npz(path: Path, arrays: Checkpoint) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def _write_safetensors(path: Path, arrays: Checkpoint) -> None:
    with needs_extra("data", ".safetensors files"):
        from safetensors.numpy import save
    path.write_bytes(save(arrays))  # save_file makes files that others cannot read


_WRITERS: Mapping[str, Callable[[Path, Checkpoint], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
