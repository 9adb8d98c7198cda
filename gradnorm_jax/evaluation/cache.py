"""Features and logits of a forward pass kept in a run's folder, and scores without the network.

Each data set has two Zarr arrays, `cache/NAME/features` `[N, D]` and `cache/NAME/logits` `[N, C]`,
with a row per position of the source; those of images that could not be decoded hold zeros. A
process writes the rows of each of its steps as one chunk, which carries a checksum.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
import tensorstore as ts

from gradnorm_jax.evaluation.folder import Folder, reading, writing
from gradnorm_jax.evaluation.hosts import Split
from gradnorm_jax.evaluation.scoring import Chunk, Feed, score_outputs
from gradnorm_jax.evaluation.table import ScoreTable
from gradnorm_jax.sharding import local_rows
from gradnorm_jax.types import Head, Model, Outputs, Params, head_parameters

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_HEAD = "cache/head.safetensors"

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
    spec = {"driver": "zarr3", "metadata": metadata}
    # Several processes may come here at once; they ask for the same.
    store = cache.folder.store / f"cache/{name}/{kind}/"
    return ts.open(spec, kvstore=store, open=True, create=True).result()


def write_head(folder: Folder, model: Model) -> None:
    """Keeps the last layer, which some scores need beside the outputs."""
    kernel, bias = head_parameters(model)
    arrays = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    folder.write(_HEAD, safetensors.numpy.save(jax.device_get(arrays)))


def head_model(folder: Folder) -> Model:
    """A model that has the last layer alone, as kept by `write_head`.

    Raises:
        FileNotFoundError: there is none.
    """
    content = folder.read(_HEAD)
    if content is None:
        raise FileNotFoundError(
            f"{folder.address} holds no cache; evaluate into it with --cache first"
        )
    params = {key: jnp.asarray(value) for key, value in safetensors.numpy.load(content).items()}
    head = Head(("kernel",), ("bias",) if "bias" in params else None)
    return Model(jax.tree_util.Partial(_no_network), params, head)


def _no_network(params: Params, images: jax.Array) -> Outputs:
    raise NotImplementedError("a cache holds the outputs of the network, not the network")


def cached_feed(folder: Folder, name: str, length: int, table: ScoreTable) -> Feed:
    """The outputs kept of a data set.

    Args:
        folder: of the run that has kept them.
        name: of the data set.
        length: the number of its positions.
        table: the rows that the run has left, whose scores do not matter here.
    """
    place = f"{folder.address}/cache/{name}"

    def chunks(split: Split, start: int) -> Iterator[Chunk]:
        with reading(place):
            arrays = [_open(folder, name, kind) for kind in Outputs._fields]
            under_way: Any = None
            for step in range(start, split.num_steps(length)):
                first = min(split.first(step), length)
                last = min(first + split.rows, length)
                following = first, [array[first:last].read() for array in arrays]
                if under_way:
                    yield _to_chunk(table, split.rows, *under_way)
                under_way = following
            if under_way:
                yield _to_chunk(table, split.rows, *under_way)

    return Feed(name, length, (), chunks, score_outputs)


def _open(folder: Folder, name: str, kind: str) -> Any:
    store = folder.store / f"cache/{name}/{kind}/"
    return ts.open({"driver": "zarr3"}, kvstore=store, open=True).result()


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
