"""A folder that files are written to whole or not at all, and what the files look like.

The libraries for both come with the extra `data`; they are imported where a folder is used.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import ScoreTable, concatenate, count_positions
from gradnorm_jax.extras import needs_extra

if TYPE_CHECKING:
    import tensorstore as ts

PATIENCE_SECONDS = 120.0
"""How long a file may take to be read or written before its storage counts as out of order."""

_SCHEMES = ("gs://", "s3://", "file://")
_AS_BITS = ":bfloat16"
_BFLOAT16 = jnp.dtype(jnp.bfloat16)
_COLUMNS = ("position", "id", "label", "prediction")
# Six more tries, after 1, 2, 4, ... 32 seconds. TensorStore's own quarter of an hour is too long to
# wait for the news that there is no connection.
_RETRIES = {"max_retries": 6}
_TRIES = {"gcs_request_retries": _RETRIES, "s3_request_retries": _RETRIES}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder by its address.

    Attributes:
        address: what users call it: a path, or a URL such as `gs://bucket/folder`.
        store: its files by their names relative to it.
    """

    address: str
    store: "ts.KvStore"

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if there is none. OSError if it cannot be read."""
        with _plain_errors(f"{self.address}/{name} cannot be read"):
            result = self.store.read(name).result(PATIENCE_SECONDS)
        return bytes(result.value) if result.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file: other readers see all of it, or none. OSError if that fails."""
        with _plain_errors(f"{self.address}/{name} cannot be written"):
            self.store.write(name, content).result(PATIENCE_SECONDS)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless there is one; whether it did.

        Of several processes that do this at once, exactly one does it. OSError if writing fails.
        """
        with _plain_errors(f"{self.address}/{name} cannot be written"):
            found = self.store.read(name).result(PATIENCE_SECONDS)
            if found.state == "value":
                return False
            # Absence is a state that a write can be made conditional on.
            write = self.store.write(name, content, if_equal=found.stamp.generation)
            return bool(write.result(PATIENCE_SECONDS).generation)

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with _plain_errors(f"{self.address}/{name} cannot be removed"):
            self.store.write(name, None).result(PATIENCE_SECONDS)

    def names(self, prefix: str = "") -> list[str]:
        """The files whose names start so, in order, hidden ones left out."""
        with _plain_errors(f"{self.address}/{prefix} cannot be listed"):
            found = (self.store / prefix).list().result(PATIENCE_SECONDS)
        names = sorted(prefix + rest.decode() for rest in found)
        return [name for name in names if not PurePosixPath(name).name.startswith(".")]


def open_folder(address: str | os.PathLike[str]) -> Folder:
    """The folder at a path or URL, which need not exist.

    Raises:
        FileExistsError: there is a file in its place.
        ValueError: its kind of storage is not known.
        OSError: its storage cannot be reached.
        ModuleNotFoundError: what reads and writes its files is not installed.
    """
    with needs_extra("data", "run folders"):
        import pyarrow.parquet  # noqa: F401
        import safetensors.numpy  # noqa: F401
        import tensorstore as ts
    address = os.fspath(address).rstrip("/") or "/"
    if "://" in address and not address.startswith(_SCHEMES):
        raise ValueError(f"cannot write to {address!r}: give a path or {', '.join(_SCHEMES)}...")
    if "://" in address and not address.startswith("file://"):
        with _plain_errors(f"{address} cannot be reached"):
            opened = ts.KvStore.open(f"{address}/", context=ts.Context(_TRIES))
            return Folder(address, opened.result())
    path = Path(os.path.abspath(os.path.expanduser(address.removeprefix("file://"))))
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} already exists and is not a folder; choose another --out")
    spec = {"driver": "file", "path": f"{path}/"}
    return Folder(address, ts.KvStore.open(spec).result())


def to_json(content: Any) -> bytes:
    """JSON as it is written to files."""
    return f"{json.dumps(content, indent=2, default=str, allow_nan=False)}\n".encode()


def encode_rows(table: ScoreTable, facts: Mapping[str, Any]) -> bytes:
    """A Parquet file with a checksum for every page.

    What has no column is in the metadata: the excluded inputs, `facts` (JSON), and a checksum of
    everything.
    """
    import pyarrow.parquet

    columns = dict(zip(_COLUMNS, table[:4], strict=True)) | dict(table.scores)
    metadata = {
        "excluded": json.dumps(table.excluded),
        "facts": json.dumps(facts),
        "sha256": digest(table, facts),
    }
    arrow = pyarrow.table(columns).replace_schema_metadata(metadata)
    file = io.BytesIO()
    pyarrow.parquet.write_table(arrow, file, write_page_checksum=True)
    return file.getvalue()


def decode_rows(content: bytes) -> tuple[ScoreTable, dict[str, Any]]:
    """The inverse of `encode_rows`; an exception of any kind if the file is damaged."""
    import pyarrow.parquet

    arrow = pyarrow.parquet.read_table(
        pyarrow.BufferReader(content), page_checksum_verification=True
    )
    metadata = arrow.schema.metadata or {}
    position, _, label, prediction = (arrow[name] for name in _COLUMNS)
    table = ScoreTable(
        position.to_numpy(),
        arrow["id"].to_pylist(),
        label.to_numpy(),
        prediction.to_numpy(),
        {n: arrow[n].to_numpy() for n in arrow.column_names if n not in _COLUMNS},
        [Excluded(*each) for each in json.loads(metadata[b"excluded"])],
    )
    facts = dict(json.loads(metadata[b"facts"]))
    if digest(table, facts).encode() != metadata[b"sha256"]:
        raise ValueError("it is not what was written")
    return table, facts


def digest(table: ScoreTable, facts: Mapping[str, Any] | None = None) -> str:
    """The SHA-256, in hexadecimal digits, of all that `encode_rows` writes."""
    words = json.dumps([table.ids, table.excluded, list(table.scores), facts])
    total = hashlib.sha256(words.encode())
    for array in (table.positions, table.labels, table.predictions, *table.scores.values()):
        total.update(f"{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


def encode_arrays(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file; bfloat16, which NumPy's flavour lacks, is kept as the bits of uint16."""
    import safetensors.numpy

    return safetensors.numpy.save(
        {
            # Not by ascontiguousarray, which makes a row of a scalar.
            f"{name}{_AS_BITS}" if array.dtype == _BFLOAT16 else name: np.asarray(
                array.view(np.uint16) if array.dtype == _BFLOAT16 else array, order="C"
            )
            for name, array in arrays.items()
        },
        None if metadata is None else dict(metadata),
    )


def decode_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The inverse of `encode_arrays`; an exception of any kind if the file is damaged."""
    import safetensors.numpy

    return {
        name.removesuffix(_AS_BITS): array.view(_BFLOAT16) if name.endswith(_AS_BITS) else array
        for name, array in safetensors.numpy.load(content).items()
    }


def checksum(content: bytes) -> str:
    """The SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_table(folder: Folder, name: str, part_size: int) -> ScoreTable | None:
    """The rows of a data set that all processes have written; None if parts are missing.

    Raises:
        ValueError: a file is damaged.
    """
    parts = sorted(list_parts(folder, rows_folder(name)))
    if parts != list(range(len(parts))) or not parts:
        return None
    last, _ = read_part(folder, name, parts[-1])
    if count_positions(last) == part_size:
        return None
    tables = [read_part(folder, name, part)[0] for part in parts[:-1]]
    for part, table in enumerate(tables):
        if count_positions(table) != part_size:
            raise ValueError(
                f"{folder.address}/{part_file(name, part)} does not hold the {part_size} inputs "
                "that it should; delete it and run the same command again"
            )
    return concatenate([*tables, last])


def read_part(folder: Folder, name: str, part: int) -> tuple[ScoreTable, dict[str, Any]]:
    """The rows of one part of a data set and what was noted beside them."""
    content = folder.read(part_file(name, part))
    try:
        if content is None:
            raise ValueError("it is gone")
        return decode_rows(content)
    except Exception as error:  # of readers of damaged files, whatever they raise
        raise ValueError(
            f"{folder.address}/{part_file(name, part)} is damaged ({type(error).__name__}); run "
            "the command that wrote it again"
        ) from error


def rows_folder(name: str) -> str:
    """Where the rows of a data set are."""
    return f"scores/{name}.parquet/"


def part_file(name: str, part: int) -> str:
    """Where the rows of a part of a data set are."""
    return f"{rows_folder(name)}{part:06}.parquet"


def list_parts(folder: Folder, prefix: str) -> frozenset[int]:
    """The parts of which there are files below `prefix`."""
    names = folder.names(prefix)
    return frozenset(int(found[1]) for each in names if (found := re.search(r"/(\d+)\.", each)))


@contextlib.contextmanager
def _plain_errors(problem: str) -> Iterator[None]:
    # TensorStore raises ValueError whatever is wrong, with details in brackets.
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).partition(" [")[0].replace("\n", " ").replace("\0", "")
        if isinstance(error, TimeoutError):
            reason = f"no answer within {PATIENCE_SECONDS:g} s"
        raise OSError(f"{problem}: {reason}") from error
