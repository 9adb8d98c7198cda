"""Encoded images in Parquet files, as Hugging Face distributes data sets."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from gradnorm_jax.data.source import Record, hash_records
from gradnorm_jax.data.stream import UNKNOWN

_COLUMNS = {"image": ("image", "img"), "label": ("label", "labels", "fine_label"), "id": ("id",)}


class ParquetSource:
    """The images of one or more Parquet files, in their order, all held in memory.

    Attributes:
        name: of the file, or of the folder of files.
        spec: what `open_source` takes to open it again.
    """

    name: str
    spec: str | None
    ignored: Sequence[str] = ()

    def __init__(self, name: str, table: pyarrow.Table, spec: str | None = None) -> None:
        """Takes a table with columns `image`, `label` and `id`."""
        self.name, self.spec = name, spec
        self._images, self._ids = table["image"], table["id"]
        self._labels = table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int, /) -> Record:
        image = self._images[index].as_py() or b""
        return Record(str(self._ids[index]), int(self._labels[index]), image)

    def fingerprint(self) -> str:
        """A hash of all images and labels."""
        return hash_records(self.name, (self[index] for index in range(len(self))))


def parquet_source(path: str | os.PathLike[str]) -> ParquetSource:
    """The images of a Parquet file, or of all `.parquet` files of a folder, by name.

    There is a column `image` or `img` of encoded images, or of structures with their `bytes`, and
    there may be `label` of integers, -1 or nothing where unknown, and `id`, by default the row.
    `labels` and `fine_label` are labels too. Other columns are not read.

    Raises:
        FileNotFoundError: there is no such file, or no Parquet file in the folder.
        ValueError: a file is no Parquet file, or has no such columns, or there is no image.
    """
    path = Path(os.path.expanduser(path))
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no Parquet file at {path}")
    table = pyarrow.concat_tables(_read(file) for file in files).combine_chunks()
    if not len(table):
        raise ValueError(f"{path} holds no image")
    if table["id"].null_count:
        rows = pyarrow.array(map(str, range(len(table))))
        table = table.set_column(table.column_names.index("id"), "id", rows)
    return ParquetSource(path.stem, table, f"parquet:{path.resolve()}")


def _read(file: Path) -> pyarrow.Table:
    try:
        known = pyarrow.parquet.read_schema(file).names
        found = {
            kind: next((name for name in names if name in known), None)
            for kind, names in _COLUMNS.items()
        }
        table = pyarrow.parquet.read_table(file, columns=[n for n in found.values() if n])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a whole Parquet file: {error}") from error
    if found["image"] is None:
        raise ValueError(
            f"{file} has no column 'image' but {', '.join(map(repr, known)) or 'none'}: rename the "
            "one that holds encoded images"
        )
    nothing = pyarrow.nulls(len(table))
    columns = {kind: table[name] if name else nothing for kind, name in found.items()}
    return pyarrow.table(
        {
            "image": _to_bytes(columns["image"], file),
            "label": _to_labels(columns["label"], file),
            "id": columns["id"].cast(pyarrow.string()),
        }
    )


def _to_bytes(column: pyarrow.ChunkedArray, file: Path) -> pyarrow.ChunkedArray:
    if pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        flat = column.combine_chunks().flatten()
        column = pyarrow.chunked_array([flat[column.type.get_field_index("bytes")]])
    if not (pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)):
        raise ValueError(
            f"{file} has images of type {column.type}: they must be encoded images (binary), or "
            "structures with their bytes"
        )
    return column.cast(pyarrow.large_binary())


def _to_labels(column: pyarrow.ChunkedArray, file: Path) -> pyarrow.Array:
    is_null = pyarrow.types.is_null(column.type)
    if not (is_null or pyarrow.types.is_integer(column.type)):
        raise ValueError(f"{file} has labels of type {column.type}: they must be integers")
    labels = column.cast(pyarrow.int64()).fill_null(UNKNOWN).to_numpy()
    if len(labels) and labels.min() < UNKNOWN:
        raise ValueError(f"{file} has the label {labels.min()}: classes are 0, 1, ..., -1 unknown")
    return pyarrow.array(np.asarray(labels, np.int32))
