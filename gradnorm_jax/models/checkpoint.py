"""Weights files and their strict conversion to and from parameter trees. Nothing is unpickled."""

import dataclasses
import functools
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gradnorm_jax.extras import needs_extra
from gradnorm_jax.tree import Params, Path

Checkpoint = dict[str, np.ndarray]
"""The arrays of a weights file by their keys."""

_LISTED = 5


@dataclasses.dataclass(frozen=True)
class CheckpointEntry:
    """Where a checkpoint holds a parameter.

    Attributes:
        key: the array's name.
        axes: the permutation that turns the checkpoint's array into the parameter, in the
            convention of `numpy.transpose`; None if they are laid out alike.
    """

    key: str
    axes: tuple[int, ...] | None = None


Layout = Callable[[Path], CheckpointEntry]
"""Tells for every parameter of an architecture where its checkpoints hold it, one to one."""


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """All arrays of a `.npz` or `.safetensors` file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, or a broken one, or one that holds pickled objects, which
            are never loaded.
    """
    path = FilePath(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}; give the path of an existing file")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        with needs_extra("data", ".safetensors files"):
            import safetensors.numpy
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
    raise ValueError(f"cannot read weights from {path}; convert it to .npz or .safetensors")


def write_checkpoint(path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Writes arrays by key to a `.npz` file.

    Raises:
        ValueError: the path does not end in `.npz`.
    """
    if FilePath(path).suffix != ".npz":
        raise ValueError(f"weights are written as .npz, got {path}; end the path in .npz")
    np.savez(path, **checkpoint)


def to_params(checkpoint: Checkpoint, template: Params, layout: Layout) -> Params:
    """The parameter tree that a checkpoint holds: every key used, every parameter filled.

    Args:
        checkpoint: arrays by key.
        template: nested dictionaries of arrays or `jax.ShapeDtypeStruct`, of the shapes and types
            wanted.
        layout: where each parameter is.

    Returns:
        A tree like `template` of NumPy arrays.

    Raises:
        ValueError: keys are missing or unexpected, or arrays are of the wrong shape or no
            floating-point numbers; one message names them all.
    """
    expected = jax.eval_shape(functools.partial(from_params, layout=layout), template)
    check_checkpoint(checkpoint, {key: leaf.shape for key, leaf in expected.items()})
    params = {}
    for path, leaf in traverse_util.flatten_dict(template).items():
        entry = layout(path)
        array = _permute(checkpoint[entry.key], entry.axes)
        params[path] = array.astype(leaf.dtype, copy=False)
    return traverse_util.unflatten_dict(params)


def from_params(params: Params, layout: Layout) -> dict[str, jax.Array]:
    """The inverse of `to_params`: the arrays of a parameter tree under the checkpoint's keys."""
    checkpoint = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        entry = layout(path)
        inverse = None if entry.axes is None else tuple(map(entry.axes.index, range(leaf.ndim)))
        checkpoint[entry.key] = _permute(leaf, inverse)
    return checkpoint


def check_checkpoint(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the checkpoint has exactly the keys and shapes expected.

    Args:
        checkpoint: arrays by key.
        expected: shapes by key.
    """
    missing = sorted(expected.keys() - checkpoint.keys())
    unexpected = sorted(checkpoint.keys() - expected.keys())
    differing = [
        f"{key} is {array.dtype}{list(array.shape)} in place of float{list(expected[key])}"
        for key, array in sorted(checkpoint.items())
        if key in expected
        and not (array.shape == expected[key] and jnp.issubdtype(array.dtype, jnp.floating))
    ]
    if missing or unexpected or differing:
        raise ValueError(
            "the checkpoint does not fit, most likely because it is of another architecture: "
            f"{_listing('missing', missing)}; {_listing('unexpected', unexpected)}; "
            f"{_listing('of another shape or type', differing)}"
        )


def _listing(title: str, names: list[str]) -> str:
    listed = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {title}" + (f" ({listed}{more})" if names else "")


def _permute(array: Any, axes: tuple[int, ...] | None) -> Any:
    return array if axes is None else array.transpose(axes)


def _read_npz(path: FilePath) -> Checkpoint:
    remedy = "write its arrays again with numpy.savez"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole .npz file; {remedy}")
    try:
        with np.load(path, allow_pickle=False) as file:
            checkpoint = dict(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read without unpickling or repair: {error}; {remedy}"
        ) from error
    for key, array in checkpoint.items():
        # A zip archive of any other kind opens too, and yields bytes.
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path} holds {key!r}, which is not an array; {remedy}")
    return checkpoint
