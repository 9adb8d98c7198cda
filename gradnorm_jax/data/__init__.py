"""Data sets of any kind as batches: files, arrays, loaders; decoding and preprocessing."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gradnorm_jax.data.array_stream import array_stream
from gradnorm_jax.data.batch_stream import batch_stream, to_rows
from gradnorm_jax.data.preprocess import Prepare, Preprocess
from gradnorm_jax.data.source import Source
from gradnorm_jax.data.stream import DataStream
from gradnorm_jax.extras import needs_extra

__all__ = ["DataStream", "array_stream", "as_stream", "batch_stream", "file_stream"]


def as_stream(
    data: Any, preprocess: Prepare = None, *, name: str | None = None, **decoding: Any
) -> DataStream:
    """A data set of any kind as a `DataStream`.

    Args:
        data: an array `[N, ...]`; a pair of it and labels `[N]`; a mapping with `image` and, if
            there are any, `label`, `id` and `mask`; a string that names files (see `open_source`);
            a `Source` of encoded images; a loader of batches, or a function that makes one (see
            `batch_stream`); or a `DataStream`, which is left as it is.
        preprocess: what files need, and what uint8 images and others may need.
        name: identifies a loader; see `batch_stream`.
        **decoding: how files are decoded: `workers`, `worker_processes`.

    Raises:
        ValueError: the data are of no such kind, or files are given without a `Preprocess`.
        OSError: files are not there.
    """
    match data:
        case DataStream():
            return data
        case str() | os.PathLike():
            return file_stream(data, preprocess, **decoding)
        case Mapping():
            rows = to_rows(data)
            return array_stream(rows.images, rows.labels, ids=rows.ids, preprocess=preprocess)
        case (images, labels) if isinstance(data, tuple) and _is_array(images):
            return array_stream(images, labels, preprocess=preprocess)
        case _ if _is_array(data):
            return array_stream(data, preprocess=preprocess)
        case Source():
            return file_stream(data, preprocess, **decoding)
        case _ if hasattr(data, "__iter__") or callable(data):
            return batch_stream(data, preprocess=preprocess, name=name)
    raise ValueError(
        f"cannot read data from a {type(data).__name__}: give an array [N, ...], (images, labels), "
        "a folder, a loader of batches, or a function that returns one"
    )


def file_stream(
    source: str | os.PathLike[str] | Source,
    preprocess: Prepare,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    **decoding: Any,
) -> DataStream:
    """The data set of encoded images; see `open_source` and `source_stream`.

    Raises:
        ValueError: `preprocess` is not a `Preprocess`, which decoding needs.
        OSError: the files are not there.
        ModuleNotFoundError: what reads them is not installed.
    """
    # They import half a second of libraries that arrays do not need.
    with needs_extra("data", "image files"):
        from gradnorm_jax.data.open_source import open_source
        from gradnorm_jax.data.source_stream import Decoding, source_stream

    if not isinstance(preprocess, Preprocess):
        raise ValueError(
            f"image files ({source}) need a Preprocess to become the network's input, got "
            f"preprocess={preprocess!r}: give one by name, such as 'imagenet224', or composed, "
            "such as 'resize=256,crop=224,mean=imagenet,std=imagenet'"
        )
    if isinstance(source, str | os.PathLike):
        source = open_source(os.fspath(source), data_dir)
    return source_stream(source, preprocess, Decoding(**decoding))


def _is_array(data: Any) -> bool:
    # The tensors of other frameworks are arrays too, rather than loaders of their rows.
    is_tensor = hasattr(data, "__array__") and hasattr(data, "shape")
    return isinstance(data, np.ndarray | jax.Array) or is_tensor
