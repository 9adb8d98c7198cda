"""From a source to fixed-size batches of pixels, the same on any number of hosts."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.sources import UNKNOWN, Source


class HostBatch(NamedTuple):
    """One host's part of a batch, in host memory.

    Rows of padding, at the end of the source, and of images that cannot be decoded have zero pixels
    and a mask of False.

    Attributes:
        pixels: `[B, H, W, 3]` uint8.
        labels: `[B]` int32, -1 where unknown.
        positions: `[B]` int64, where in the source; -1 for padding.
        mask: `[B]` bool, whether the row holds an image.
        ids: B ids; "" for padding.
        bad: id and reason of each image in this batch that cannot be decoded.
    """

    pixels: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    ids: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


class _Row(NamedTuple):
    """One row of a batch; `pixels` is None if there is no image, `reason` says why if it is bad."""

    position: int = -1
    id: str = ""
    label: int = UNKNOWN
    pixels: np.ndarray | None = None
    reason: str = ""


def num_batches(length: int, batch_size: int, process_count: int = 1) -> int:
    """The number of batches of each host: `length / (batch_size * process_count)`, rounded up."""
    return -(-length // (batch_size * process_count))


def batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    workers: int | None = None,
    processes: bool = False,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[HostBatch]:
    """Decodes and preprocesses a source in order, ahead of the consumer.

    Step s of all hosts together covers the `process_count * batch_size` positions from
    `s * process_count * batch_size` on, and each host takes its `batch_size` in a row. So every
    position comes once, every host has `num_batches` batches, and the order depends on nothing.
    An image that cannot be decoded keeps its row, masked, and is reported in `bad`.

    Args:
        source: the images.
        preprocess: makes the pixels.
        batch_size: B, the rows per batch of this host.
        workers: how many images are decoded at once; by default as many as there are CPUs.
        processes: decode in `workers` processes instead of threads, for many cores and small
            images, where Python's own lock is the limit. They take seconds to start, each holds two
            batches, and the calling script needs an `if __name__ == "__main__"` guard.
        start: the first batch wanted; those before it are not read.
        process_index: which host this is, 0 <= process_index < process_count.
        process_count: the number of hosts.

    Returns:
        An iterator over `num_batches(...) - start` batches. Up to two are decoded ahead while the
        caller is busy with one; closing the iterator ends that.

    Raises:
        ValueError: an argument is out of range.
        OSError: while iterating: an image file cannot be read. That is not a property of the image,
            so it is not counted as a bad one.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    _check("batch_size", batch_size, 1)
    _check("workers", workers, 1)
    _check("process_count", process_count, 1)
    _check("process_index", process_index, 0, process_count - 1)
    steps = num_batches(len(source), batch_size, process_count)
    _check("start", start, 0, steps)
    load = functools.partial(
        _load_row,
        source=source,
        preprocess=preprocess,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    collate = functools.partial(_collate, size=preprocess.size)
    rows = grain.MapDataset.range(start * batch_size, steps * batch_size).map(load)
    if processes:
        # Whole batches travel through shared memory, one waiting in each process.
        _parse_flags()
        dataset = (
            rows.batch(batch_size, batch_fn=collate)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=1))
        )
    else:
        # Threads share images, not batches, so that all of them work on the batch needed next.
        ahead = max(2 * batch_size, workers)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
        dataset = rows.to_iter_dataset(options).batch(batch_size, batch_fn=collate)
    return _iterate(dataset, steps - start)


def _load_row(
    slot: int,
    *,
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> _Row:
    """Row `slot` of all rows of this host."""
    step, row = divmod(slot, batch_size)
    position = (step * process_count + process_index) * batch_size + row
    if position >= len(source):
        return _Row()
    record = source[position]
    try:
        pixels = preprocess.pixels(decode_rgb(record.data))
    except BadImage as error:
        return _Row(position, record.id, record.label, reason=str(error))
    return _Row(position, record.id, record.label, pixels)


def _collate(rows: Sequence[_Row], *, size: int) -> HostBatch:
    nothing = np.zeros((size, size, 3), np.uint8)
    return HostBatch(
        pixels=np.stack([nothing if row.pixels is None else row.pixels for row in rows]),
        labels=np.array([row.label for row in rows], np.int32),
        positions=np.array([row.position for row in rows], np.int64),
        mask=np.array([row.pixels is not None for row in rows]),
        ids=tuple(row.id for row in rows),
        bad=tuple((row.id, row.reason) for row in rows if row.reason),
    )


def _iterate(dataset: grain.IterDataset[HostBatch], count: int) -> Iterator[HostBatch]:
    done = 0
    with contextlib.closing(iter(dataset)) as iterator:
        for batch in iterator:
            done += 1
            yield batch
    if done < count:
        # A worker process that cannot send a batch only prints why, and then seems to be finished.
        raise RuntimeError(f"the loader stopped after {done} of {count} batches: see the log above")


def _parse_flags() -> None:
    # Grain's processes ask for Abseil flags, which only programs built on Abseil parse.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {limits}, got {value}")
