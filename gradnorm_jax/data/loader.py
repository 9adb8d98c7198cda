"""From a source to fixed-size batches of pixels, the same on any number of hosts."""

import contextlib
import functools
import gc
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.sources import UNKNOWN, Source
from gradnorm_jax.data.split import Split


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


def available_cpus() -> int:
    """The number of CPUs that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batches(
    source: Source,
    preprocess: Preprocess,
    split: Split,
    *,
    start: int = 0,
    workers: int | None = None,
    worker_processes: bool = False,
) -> Iterator[HostBatch]:
    """Decodes and preprocesses a host's share of a source in order, ahead of the consumer.

    The order depends on nothing. An image that cannot be decoded keeps its row, masked, and is
    reported in `bad`.

    Args:
        source: the images.
        preprocess: makes the pixels.
        split: which positions make up each batch.
        start: the first batch wanted; those before it are not read.
        workers: how many images are decoded at once; by default `available_cpus()`.
        worker_processes: decode in processes instead of threads, for many cores and small images,
            where Python's own lock is the limit. They take seconds to start, each holds two
            batches, and the calling script needs an `if __name__ == "__main__"` guard.

    Returns:
        An iterator over `split.num_steps(len(source)) - start` batches. Up to two are decoded
        ahead while the caller is busy with one; closing the iterator ends that.

    Raises:
        ValueError: an argument is out of range.
        OSError: while iterating: an image file cannot be read. That is not a property of the image,
            so it is not counted as a bad one.
    """
    workers = available_cpus() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    steps = split.num_steps(len(source))
    if not 0 <= start <= steps:
        raise ValueError(f"start must be from 0 to {steps}, got {start}")
    load = functools.partial(_load_row, source=source, preprocess=preprocess, split=split)
    collate = functools.partial(_collate, size=preprocess.size)
    rows = grain.MapDataset.range(start * split.rows, steps * split.rows).map(load)
    if worker_processes:
        # Whole batches travel through shared memory, one waiting in each process.
        _parse_flags()
        workers = min(workers, steps - start)
        dataset = (
            rows.batch(split.rows, batch_fn=collate)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=1))
        )
        return _tidy_up(_iterate(dataset, steps - start))
    # Threads share images, not batches, so that all of them work on the batch needed next.
    ahead = max(2 * split.rows, workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    dataset = rows.to_iter_dataset(options).batch(split.rows, batch_fn=collate)
    return _iterate(dataset, steps - start)


def _load_row(slot: int, *, source: Source, preprocess: Preprocess, split: Split) -> _Row:
    """Row `slot` of all rows of this host."""
    step, row = divmod(slot, split.rows)
    position = split.first(step) + row
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


def _tidy_up(loaded: Iterator[HostBatch]) -> Iterator[HostBatch]:
    yield from loaded
    # Grain leaves semaphores and shared memory of its processes in cycles of references. They would
    # be lost to the system until this process ends, which then complains of them.
    gc.collect()


def _parse_flags() -> None:
    # Grain's processes ask for Abseil flags, which only programs built on Abseil parse.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
