"""Features and logits of a forward pass kept beside the scores, and data sets made of them.

Each part of a data set has a file `cache/NAME/PART.safetensors` with `features` `[n, D]` and
`logits` `[n, C]`, a row for each input that has a row in the scores of the part, in whose metadata
its checksum is.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import DataStream, HostBatch, pad_rows
from gradnorm_jax.evaluation.records import (
    ScoredBatch,
    ScoreTable,
    concatenate,
    count_positions,
)
from gradnorm_jax.evaluation.storage import (
    Folder,
    checksum,
    decode_arrays,
    digest,
    encode_arrays,
    read_part,
    read_table,
)
from gradnorm_jax.types import Head, Model, Outputs, Variables, head_parameters

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": jax.numpy.bfloat16.dtype,
}
_HEAD = "cache/head.safetensors"


@dataclasses.dataclass(frozen=True)
class OutputCache:
    """Where features and logits are kept.

    Attributes:
        folder: of the run.
        dtype: of the arrays, a key of `DTYPES`.
    """

    folder: Folder
    dtype: str

    def write(self, name: str, part: int, batches: Sequence[ScoredBatch]) -> str:
        """Writes the outputs of one part's batches; returns their checksum."""
        rows = [
            jax.tree.map(lambda x, mask=batch.mask: np.asarray(x)[mask], batch.outputs)
            for batch in batches
            if batch.outputs is not None
        ]
        arrays = {
            kind: np.concatenate([getattr(each, kind) for each in rows]).astype(DTYPES[self.dtype])
            for kind in Outputs._fields
            if rows and getattr(rows[0], kind) is not None
        }
        content = encode_arrays(arrays)
        self.folder.write(_file(name, part), content)
        return checksum(content)

    def read(self, name: str, part: int, facts: Mapping[str, Any]) -> bytes:
        """The file of one part's outputs.

        Args:
            name: of the data set.
            part: which.
            facts: what was noted beside the rows of the part.

        Raises:
            ValueError: it is damaged or missing.
        """
        content = self.folder.read(_file(name, part))
        if content is None or checksum(content) != facts.get("outputs"):
            problem = "missing" if content is None else "damaged"
            raise ValueError(
                f"{self.folder.address}/{_file(name, part)} is {problem}; run the command that "
                "wrote it again"
            )
        return content


def write_head(folder: Folder, model: Model) -> None:
    """Keeps the last layer, which some scores need beside the outputs."""
    arrays = {}
    if model.head is not None:
        kernel, bias = head_parameters(model)
        arrays = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    folder.write(_HEAD, encode_arrays(jax.device_get(arrays)))


def read_head(folder: Folder) -> Model:
    """A model that has the last layer alone, as kept by `write_head`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    content = folder.read(_HEAD)
    if content is None:
        raise FileNotFoundError(
            f"{folder.address} holds no whole cache; evaluate into it with a cache first"
        )
    try:
        params = decode_arrays(content)
        if params and params["kernel"].ndim != 2:
            raise ValueError("it holds no kernel")
    except Exception as error:  # of a reader of damaged files, whatever it raises
        raise ValueError(
            f"{folder.address}/{_HEAD} is damaged; run the command that wrote it again"
        ) from error
    head = None
    if params:
        head = Head(("kernel",), ("bias",) if "bias" in params else None)
    return Model(jax.tree_util.Partial(_no_network), Variables(params), head)


def cached_stream(
    folder: Folder, name: str, part_size: int, classes: int | None = None
) -> DataStream:
    """The outputs kept of a data set, as a data set; its labels, ids and exclusions are the same.

    Batches may be of any size, whatever that of the parts, `part_size`.

    Raises:
        ValueError: the run has not come to its end, or a file is damaged.
    """
    table = read_table(folder, name, part_size)
    if table is None:
        raise ValueError(
            f"{folder.address} does not hold all of {name}; run the command that wrote it again"
        )

    length = count_positions(table)

    def batches(schedule: BatchSchedule) -> Iterator[HostBatch]:
        size = schedule.batch_size
        parts: dict[int, tuple[ScoreTable, Outputs]] = {}
        for number in schedule.taken(length):
            first, last = number * size, min(number * size + size - 1, length)
            parts = {
                part: parts.get(part) or _read(folder, name, part, read_part(folder, name, part))
                for part in range(first // part_size, last // part_size + 1)
            }
            yield _to_host_batch(number, size, *_join([*parts.values()]))

    def identity() -> dict[str, Any]:
        return {"inputs": length, "sha256": digest(table)}

    return DataStream(batches, length, identity, classes=classes)


def _read(
    folder: Folder, name: str, part: int, scored: tuple[ScoreTable, dict[str, Any]]
) -> tuple[ScoreTable, Outputs]:
    table, facts = scored
    content = OutputCache(folder, "float32").read(name, part, facts)
    arrays = {key: array.astype(np.float32) for key, array in decode_arrays(content).items()}
    # A part that holds no input, the last perhaps, has neither.
    return table, Outputs(arrays.get("features"), arrays.get("logits"))  # type: ignore[arg-type]


def _join(parts: Sequence[tuple[ScoreTable, Outputs]]) -> tuple[ScoreTable, Outputs]:
    if len(parts) == 1:
        return parts[0]
    held = [outputs for _, outputs in parts if outputs.logits is not None]
    outputs = jax.tree.map(lambda *x: np.concatenate(x), *held) if held else parts[0][1]
    return concatenate([table for table, _ in parts]), outputs


def _to_host_batch(number: int, size: int, table: ScoreTable, outputs: Outputs) -> HostBatch:
    first = number * size
    found = slice(*np.searchsorted(table.positions, [first, first + size]))
    positions = table.positions[found]
    return HostBatch(
        number=number,
        data=jax.tree.map(lambda x: pad_rows(x[found], size), outputs),
        mask=np.arange(size) < len(positions),
        positions=positions,
        ids=table.ids[found],
        labels=table.labels[found],
        excluded=[e for e in table.excluded if first <= e.position < first + size],
    )


def _file(name: str, part: int) -> str:
    return f"cache/{name}/{part:06}.safetensors"


def _no_network(variables: Variables, images: jax.Array) -> Outputs:
    raise NotImplementedError("a cache holds the outputs of the network, not the network")
