"""Sources of encoded images by the way users name them."""

import os
from pathlib import Path

from gradnorm_jax.data.folder_source import folder_source
from gradnorm_jax.data.list_source import csv_source, list_source
from gradnorm_jax.data.source import Source
from gradnorm_jax.extras import needs_extra

_KINDS = (
    "folder:PATH",
    "csv:PATH",
    "list:PATH[@FOLDER]",
    "parquet:PATH",
    "tfds:NAME[/CONFIG][:SPLIT]",
)


def open_source(spec: str, data_dir: str | os.PathLike[str] | None = None) -> Source:
    """Opens a source by the way users name one.

    Args:
        spec: `folder:PATH` (see `folder_source`), `csv:PATH` (see `csv_source`),
            `list:PATH[@FOLDER]` (see `list_source`), `parquet:PATH` (see `parquet_source`),
            `tfds:NAME[/CONFIG][:SPLIT]` (see `tfds_source`), or a bare path: of a CSV or Parquet
            file if it ends in `.csv` or `.parquet`, of a folder otherwise.
        data_dir: where `tfds:` looks for prepared data sets; by default where tfds itself does, in
            TFDS_DATA_DIR or else ~/tensorflow_datasets.

    Raises:
        ValueError: an unknown kind of source, or what the kind's own function raises.
        FileNotFoundError: nothing is there.
        ImportError: a data set prepared as TFRecord, without TensorFlow.
    """
    kind, colon, rest = spec.partition(":")
    match kind if colon else None:
        case "folder":
            return folder_source(rest)
        case "csv":
            return csv_source(rest)
        case "list":
            path, at, root = rest.rpartition("@")
            return list_source(path, root) if at and not Path(rest).exists() else list_source(rest)
        case "parquet":
            return _open_parquet(rest)
        case "tfds":
            # Takes half a second to import, and is not needed for files.
            with needs_extra("data", "data sets of tfds"):
                from gradnorm_jax.data.tfds_source import tfds_source

            return tfds_source(rest, data_dir)
    # One letter before the colon is a drive of Windows.
    if colon and len(kind) > 1 and not Path(spec).exists():
        raise ValueError(
            f"unknown kind of source {kind!r} in {spec!r}: use {', '.join(_KINDS)} or the path of "
            "a folder"
        )
    match Path(spec).suffix.lower():
        case ".csv":
            return csv_source(spec)
        case ".parquet":
            return _open_parquet(spec)
    return folder_source(spec)


def _open_parquet(path: str) -> Source:
    with needs_extra("data", "Parquet files"):
        from gradnorm_jax.data.parquet_source import parquet_source

    return parquet_source(path)
