"""NumPy's `.npz` files, without pickled objects."""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from gradnorm_jax.weights.stored import Checkpoint, Stored, readable

_REMEDY = "write its arrays again with numpy.savez"


def open_npz(path: Path) -> Stored:
    """A `.npz` file, of which the headers are read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole .npz file; {_REMEDY}")
    with readable(path, _REMEDY), zipfile.ZipFile(path) as archive:
        headers = _read_headers(archive)

    def read(keys: Iterable[str]) -> Checkpoint:
        with readable(path, _REMEDY), np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}

    return Stored(headers, read)


def _read_headers(archive: zipfile.ZipFile) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a `.npz` file, none of which is read."""
    headers: dict[str, jax.ShapeDtypeStruct] = {}
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        if key in headers:
            raise ValueError(f"it holds {key!r} twice")
        if key == member.filename:
            # A zip archive of any other kind opens too.
            raise ValueError(f"it holds {key!r}, which is not an array")
        headers[key] = _read_header(archive, member)
    return headers


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> jax.ShapeDtypeStruct:
    with archive.open(member) as file:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(np.lib.format.read_magic(file))
        if read is None:
            raise ValueError(f"{member.filename!r} is of an unknown version")
        shape, _, dtype = read(file)
        size = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they are pickled")
    # A header can claim anything, and memory is set aside for what it claims.
    whole = all(0 <= n < 2**40 for n in shape) and math.prod(shape) * dtype.itemsize == size
    if not whole:
        raise ValueError(
            f"the header of {member.filename!r} claims {dtype}{list(shape)}, but "
            f"{size} bytes follow"
        )
    return jax.ShapeDtypeStruct(shape, dtype)
