"""Tables as Parquet and statistics as safetensors, each with how many steps it is of."""

import io
import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors
import safetensors.numpy

from gradnorm_jax.evaluation.table import Excluded, ScoreTable

BROKEN = (pyarrow.ArrowException, safetensors.SafetensorError, OSError, ValueError, KeyError)
"""What decoding a damaged file raises."""

_COLUMNS = ("position", "id", "label", "prediction")


class Part(NamedTuple):
    """The rows of some steps.

    Attributes:
        steps: how many.
        table: their rows.
    """

    steps: int
    table: ScoreTable


class Statistics(NamedTuple):
    """What the images of some steps tell fitted detectors.

    Attributes:
        steps: how many.
        sums: pytree of arrays.
    """

    steps: int
    sums: Any


def encode_rows(part: Part) -> bytes:
    """A Parquet file with a checksum for every page; excluded files are in its metadata."""
    table = part.table
    columns = dict(zip(_COLUMNS, table[:4], strict=True)) | dict(table.scores)
    metadata = {"steps": str(part.steps), "excluded": json.dumps(table.excluded)}
    arrow = pyarrow.table(columns).replace_schema_metadata(metadata)
    file = io.BytesIO()
    pyarrow.parquet.write_table(arrow, file, write_page_checksum=True)
    return file.getvalue()


def decode_rows(content: bytes) -> Part:
    """The inverse of `encode_rows`; one of `BROKEN` if the file is damaged."""
    arrow = pyarrow.parquet.read_table(
        pyarrow.BufferReader(content), page_checksum_verification=True
    )
    metadata = arrow.schema.metadata
    excluded = [Excluded(*each) for each in json.loads(metadata[b"excluded"])]
    position, _, label, prediction = (arrow[name] for name in _COLUMNS)
    scores = {n: arrow[n].to_numpy() for n in arrow.column_names if n not in _COLUMNS}
    return Part(
        int(metadata[b"steps"]),
        ScoreTable(
            position.to_numpy(),
            arrow["id"].to_pylist(),
            label.to_numpy(),
            prediction.to_numpy(),
            scores,
            excluded,
        ),
    )


def decode_steps(content: bytes) -> int:
    """The number of steps in what `encode_rows` has made, which must not be cut off."""
    return int(pyarrow.parquet.read_schema(pyarrow.BufferReader(content)).metadata[b"steps"])


def encode_statistics(statistics: Statistics) -> bytes:
    """A safetensors file."""
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(statistics.sums))}
    return safetensors.numpy.save({"steps": np.array([statistics.steps]), **leaves})


def decode_statistics(content: bytes, like: Any) -> Statistics:
    """The inverse of `encode_statistics`; `like` is a pytree of the same structure."""
    arrays = safetensors.numpy.load(content)
    leaves = [arrays[str(i)] for i in range(len(jax.tree.leaves(like)))]
    return Statistics(int(arrays["steps"][0]), jax.tree.unflatten(jax.tree.structure(like), leaves))
