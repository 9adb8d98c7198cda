"""Features and logits of a forward pass kept in a run's folder, and scores without the network.

Each data set has two Zarr arrays, `cache/NAME/features` `[N, D]` and `cache/NAME/logits` `[N, C]`,
with a row per position of the source; those of images that could not be decoded mean nothing. A
process writes the rows of each of its steps as one chunk, which carries a checksum: the batch size
sets the size of chunks, `[B / processes, D]`, and their number. Beside the arrays are the last
layer and the names of files that were passed over.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
import tensorstore as ts

from gradnorm_jax.data.split import Split
from gradnorm_jax.evaluation.folder import Folder, reading, to_json, writing
from gradnorm_jax.evaluation.scoring import Chunk, Feed, one_ahead, score_outputs
from gradnorm_jax.evaluation.table import ScoreTable
from gradnorm_jax.sharding import local_rows
from gradnorm_jax.types import Head, Model, Outputs, Params, head_parameters

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_HEAD = "cache/head.safetensors"
_IGNORED = "cache/ignored.json"

Wait = Callable[[], None]
"""Returns when what has been started is done; OSError if it has failed."""


class Cache(NamedTuple):
    """Where features and logits are kept.

    Attributes:
        folder: of the run.
        dtype: of the arrays, a key of `DTYPES`.
    """

    folder: Folder
    dtype: str

    def writer(self, name: str, length: int, split: Split) -> Callable[[int, Outputs], Wait]:
        """What keeps a data set's outputs `[B, ...]`, of which it takes this process's rows.

        Args:
            name: of the data set.
            length: the number of its positions.
            split: how they are dealt out to processes.

        Returns:
            A function of the first row's position and the outputs, which starts to write them.
        """
        create = functools.cache(functools.partial(_create, self, name, length, split.rows))
        place = f"{self.folder.address}/cache/{name}"

        def write(first: int, outputs: Outputs) -> Wait:
            count = min(split.rows, length - first)
            if count <= 0:
                return lambda: None
            arrays = {kind: local_rows(array)[:count] for kind, array in outputs._asdict().items()}
            with writing(place):
                writes = [
                    create(kind, rows.shape[1])[first : first + count].write(
                        rows.astype(DTYPES[self.dtype])
                    )
                    for kind, rows in arrays.items()
                ]
            return functools.partial(_wait, writes, place)

        return write

    def count_steps(self, name: str, length: int, split: Split) -> int:
        """How many of this process's first steps have all their chunks; see `writer`."""
        place = f"cache/{name}/"
        there = set(self.folder.names(place))
        for step in range(split.num_steps(length)):
            first = split.first(step)
            files = ("zarr.json", f"c/{first // split.rows}/0")
            needed = {f"{place}{kind}/{file}" for kind in Outputs._fields for file in files}
            if first < length and not needed <= there:
                return step
        return split.num_steps(length)


def _wait(writes: list[Any], place: str) -> None:
    with writing(place):
        for write in writes:
            write.result()


def _create(cache: Cache, name: str, length: int, rows: int, kind: str, size: int) -> Any:
    metadata = {
        "shape": [length, size],
        "data_type": cache.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, size]}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
    }
    # Zeros are written like all else, so that a chunk that is not there has been lost.
    spec = {"driver": "zarr3", "metadata": metadata, "store_data_equal_to_fill_value": True}
    # Several processes may come here at once; they ask for the same.
    store = cache.folder.store / f"cache/{name}/{kind}/"
    return ts.open(spec, kvstore=store, open=True, create=True).result()


def write_context(folder: Folder, model: Model, ignored: Mapping[str, Sequence[str]]) -> None:
    """Keeps what scores and reports need beside the outputs.

    Args:
        folder: of the run.
        model: of which the last layer is kept.
        ignored: by data set, the files that were passed over because of their names.
    """
    folder.write(_IGNORED, to_json(ignored))
    kernel, bias = head_parameters(model)
    arrays = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    folder.write(_HEAD, safetensors.numpy.save(jax.device_get(arrays)))


def head_model(folder: Folder) -> Model:
    """A model that has the last layer alone, as kept by `write_context`.

    Raises:
        FileNotFoundError: there is none.
    """
    arrays = safetensors.numpy.load(_read_context(folder, _HEAD))
    params = {key: jnp.asarray(value) for key, value in arrays.items()}
    head = Head(("kernel",), ("bias",) if "bias" in params else None)
    return Model(jax.tree_util.Partial(_no_network), params, head)


def read_ignored(folder: Folder) -> dict[str, list[str]]:
    """By data set, the files passed over because of their names; see `write_context`."""
    return dict(json.loads(_read_context(folder, _IGNORED)))


def _read_context(folder: Folder, name: str) -> bytes:
    content = folder.read(name)
    if content is None:
        raise FileNotFoundError(
            f"{folder.address} holds no whole cache; evaluate into it with --cache first"
        )
    return content


def _no_network(params: Params, images: jax.Array) -> Outputs:
    raise NotImplementedError("a cache holds the outputs of the network, not the network")


def cached_feed(
    folder: Folder, name: str, length: int, table: ScoreTable, ignored: Sequence[str] = ()
) -> Feed:
    """The outputs kept of a data set.

    Args:
        folder: of the run that has kept them.
        name: of the data set.
        length: the number of its positions.
        table: the rows that the run has left, whose scores do not matter here.
        ignored: the files that it has passed over because of their names.
    """
    place = f"{folder.address}/cache/{name}"
    remedy = "; if a file is damaged, delete it; the run that wrote it, started again, mends that"

    def chunks(split: Split, start: int) -> Iterator[Chunk]:
        with reading(place, remedy):
            arrays = [_open(folder, name, kind) for kind in Outputs._fields]
            firsts = (
                min(split.first(step), length) for step in range(start, split.num_steps(length))
            )
            started = (
                (first, [array[first : min(first + split.rows, length)].read() for array in arrays])
                for first in firsts
            )
            for first, reads in one_ahead(started):
                yield _to_chunk(table, split.rows, first, reads)

    return Feed(name, length, ignored, chunks, score_outputs)


def _open(folder: Folder, name: str, kind: str) -> Any:
    store = folder.store / f"cache/{name}/{kind}/"
    spec = {"driver": "zarr3", "fill_missing_data_reads": False}
    return ts.open(spec, kvstore=store, open=True).result()


def _to_chunk(table: ScoreTable, rows: int, first: int, reads: list[Any]) -> Chunk:
    outputs: Any = Outputs._make(_fill_up(read.result(), rows) for read in reads)
    found = slice(*np.searchsorted(table.positions, [first, first + rows]))
    positions = table.positions[found]
    mask, predictions = np.zeros(rows, bool), np.zeros(rows, np.int32)
    mask[positions - first] = True
    predictions[positions - first] = table.predictions[found]
    excluded = [each for each in table.excluded if first <= each.position < first + rows]
    return Chunk(
        (outputs, predictions), mask, positions, table.ids[found], table.labels[found], excluded
    )


def _fill_up(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array.astype(np.float32), ((0, rows - len(array)), (0, 0)))
