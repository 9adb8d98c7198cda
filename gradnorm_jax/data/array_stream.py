"""Arrays in memory as a data set."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradnorm_jax.data.preprocess import Prepare, to_pixels
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import DataStream, HostBatch, to_host_batch


def array_stream(
    images: Any, labels: Any = None, *, ids: Any = None, preprocess: Prepare = None
) -> DataStream:
    """The data set of inputs `[N, ...]` and, if they are known, labels `[N]`.

    Args:
        images: an array of any type and shape, as the network, or `preprocess`, takes it.
        labels: integers; -1 where unknown.
        ids: of the inputs, `[N]`; their positions if None.
        preprocess: a `Preprocess` makes what the network takes of uint8 pixels, image by image.

    Raises:
        ValueError: there is not one label for each input, or the labels are not integers.
    """
    images = np.asarray(images)
    if images.ndim < 2:
        raise ValueError(f"images must be an array [N, ...], got shape {images.shape}")
    labels = None if labels is None else check_labels(labels, len(images))

    def batches(schedule: BatchSchedule) -> Iterator[HostBatch]:
        size = schedule.batch_size
        for number in schedule.taken(len(images)):
            rows = slice(number * size, (number + 1) * size)
            yield to_host_batch(
                number,
                to_pixels(images[rows], preprocess),
                size,
                ids=None if ids is None else list(map(str, ids[rows])),
                labels=None if labels is None else labels[rows],
            )

    return DataStream(batches, len(images), lambda: _identity(images, labels, ids))


def check_labels(labels: Any, count: int) -> np.ndarray:
    """`labels` as int32 `[count]`; ValueError if they are not integers, or not as many."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels must have one class per input, [{count}], got {labels.shape}")
    if count and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers (class numbers), got {labels.dtype}")
    return labels.astype(np.int32)


def _identity(images: np.ndarray, labels: np.ndarray | None, ids: Any) -> dict[str, Any]:
    digest = hashlib.sha256(b"" if ids is None else json.dumps(list(map(str, ids))).encode())
    for array in (images,) if labels is None else (images, labels):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return {"inputs": len(images), "sha256": digest.hexdigest()}
