"""Batches of any loader as a data set: Grain, tf.data, PyTorch, Hugging Face, a function."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradnorm_jax.data.array_stream import check_labels
from gradnorm_jax.data.images import to_rgb
from gradnorm_jax.data.preprocess import Prepare, to_pixels
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import UNKNOWN, DataStream, HostBatch, to_host_batch

_KEYS = {
    "images": ("image", "images", "x", "inputs", "pixel_values", "img"),
    "labels": ("label", "labels", "y"),
    "ids": ("id", "ids", "file_name"),
    "mask": ("mask", "_mask"),
}
"""What loaders call their entries, the first being ours."""


class Rows(NamedTuple):
    """Inputs in host memory.

    Attributes:
        images: `[N, ...]`.
        labels: `[N]` int32, -1 where unknown.
        ids: N ids; None if they have none but their positions.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray | None


def batch_stream(
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    preprocess: Prepare = None,
    name: str | None = None,
    length: int | None = None,
) -> DataStream:
    """The data set of what a loader yields, in its order.

    Each element is an array `[b, ...]` of inputs, a pair of inputs and labels, or a mapping with
    `image` and, if there are any, `label`, `id` and `mask` (false for rows of padding). Elements
    may differ in b, and be single examples where their label, or the kind of their image, shows it.

    Args:
        data: something that can be iterated over any number of times, or a function that returns
            such a thing, or an iterator, each time it is called.
        preprocess: a `Preprocess` makes what the network takes of uint8 pixels, image by image.
        name: tells the data set from others. A stream has no content that could be compared before
            it is read, so this and its place in the evaluation are all that identifies it.
        length: the number of inputs, if it is known.

    Raises:
        ValueError: `data` is an iterator, which can be read only once; while iterating: an element
            is none of the above, or `length` is wrong.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"a {type(data).__name__} can be read only once: give a function that makes a new one, "
            "such as lambda: iter(loader), or the loader itself"
        )
    make = data if callable(data) and not hasattr(data, "__iter__") else lambda: data

    def batches(schedule: BatchSchedule) -> Iterator[HostBatch]:
        count = 0
        for number, rows in enumerate(_rebatch(map(to_rows, make()), schedule.batch_size)):
            count += sum(len(each.images) for each in rows)
            if schedule.takes(number):
                yield _collate(number, rows, schedule.batch_size, preprocess)
        if length is not None and count != length:
            raise ValueError(f"the stream was said to hold {length} inputs, but it holds {count}")

    return DataStream(batches, length, lambda: {"stream": name})


def _rebatch(elements: Iterator[Rows], size: int) -> Iterator[list[Rows]]:
    """The same rows, `size` at a time, in pieces; the last batch is not full."""
    pieces: list[Rows] = []
    missing = size
    last = None
    for rows in elements:
        last = rows
        while len(rows.images) >= missing:
            yield [*pieces, _take(rows, slice(missing))]
            rows = _take(rows, slice(missing, None))
            pieces, missing = [], size
        if len(rows.images):
            pieces.append(rows)
            missing -= len(rows.images)
    if last is not None:
        yield pieces or [_take(last, slice(0))]


def _take(rows: Rows, which: Any) -> Rows:
    ids = None if rows.ids is None else rows.ids[which]
    return Rows(rows.images[which], rows.labels[which], ids)


def _collate(number: int, pieces: list[Rows], size: int, preprocess: Prepare) -> HostBatch:
    images = [to_pixels(rows.images, preprocess) for rows in pieces]
    if len({each.shape[1:] for each in images}) > 1:
        raise ValueError(
            f"inputs must have one shape, got {', '.join(str(each.shape[1:]) for each in images)}: "
            "give a Preprocess for images of several sizes"
        )
    ids = [rows.ids for rows in pieces if rows.ids is not None]
    return to_host_batch(
        number,
        np.concatenate(images),
        size,
        ids=np.concatenate(ids).tolist() if len(ids) == len(pieces) else None,
        labels=np.concatenate([rows.labels for rows in pieces]),
    )


def to_rows(element: Any) -> Rows:
    """The inputs of a batch, or of a single example; see `batch_stream`.

    Raises:
        ValueError: it is none of what a loader may yield.
    """
    images, labels, ids, mask = _entries(element)
    if _is_image(images) or (labels is not None and np.ndim(labels) == 0):
        images = [images]
        labels, ids, mask = (
            None if x is None else np.asarray(x)[np.newaxis] for x in (labels, ids, mask)
        )
    images = _stack(images)
    labels = (
        np.full(len(images), UNKNOWN, np.int32)
        if labels is None
        else check_labels(labels, len(images))
    )
    rows = Rows(images, labels, None if ids is None else _decode(ids))
    if mask is None:
        return rows
    mask = np.asarray(mask).astype(bool)
    if mask.shape != (len(images),):
        raise ValueError(
            f"mask must say of each input whether it is one, [{len(images)}], got {mask.shape}"
        )
    return _take(rows, mask)


def _entries(element: Any) -> tuple[Any, Any, Any, Any]:
    if isinstance(element, Mapping):
        found = {
            what: next((element[key] for key in keys if key in element), None)
            for what, keys in _KEYS.items()
        }
        if found["images"] is None:
            raise ValueError(
                f"a batch must have an entry called 'image', got only {sorted(map(str, element))}"
            )
        return tuple(found.values())  # type: ignore[return-value]
    if isinstance(element, tuple | list) and not all(map(_is_image, element)):
        if len(element) != 2:
            raise ValueError(
                "a batch must be an array, (images, labels) or a mapping, got "
                f"{len(element)} entries"
            )
        return (*element, None, None)
    return element, None, None, None


def _is_image(entry: Any) -> bool:
    # Who has an image has imported Pillow.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(entry, pillow.Image)


def _to_array(image: Any) -> np.ndarray:
    # The values of other modes are no colours, or not those of RGB.
    is_colours = not _is_image(image) or image.mode in ("L", "RGB")
    return np.asarray(image if is_colours else to_rgb(image))


def _stack(images: Any) -> np.ndarray:
    if isinstance(images, list | tuple):
        arrays = [_to_array(image) for image in images]
        if len({array.shape for array in arrays}) != 1:
            stacked = np.empty(len(arrays), object)
            stacked[:] = arrays
            return stacked
        return np.stack(arrays)
    return np.asarray(images)


def _decode(ids: Any) -> np.ndarray:
    return np.array([i.decode() if isinstance(i, bytes) else str(i) for i in np.asarray(ids)])
