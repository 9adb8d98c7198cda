"""A source of encoded images as a data set: decoded in parallel, ahead of the devices."""

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source import Source
from gradnorm_jax.data.stream import UNKNOWN, DataStream, Excluded, HostBatch


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How images are decoded; no result depends on it.

    Attributes:
        workers: how many at once; by default `available_cpus()`.
        worker_processes: in processes instead of threads, for many cores and small images, where
            Python's own lock is the limit. They take seconds to start, each holds two batches, and
            the calling script needs an `if __name__ == "__main__"` guard.

    Raises:
        ValueError: there is to be no worker.
    """

    workers: int | None = None
    worker_processes: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


def source_stream(
    source: Source, preprocess: Preprocess, decoding: Decoding = Decoding()
) -> DataStream:
    """The data set of a source's images.

    The order is deterministic. Up to two batches are decoded ahead while the caller is busy with
    one; closing the iterator ends that. An image that cannot be decoded is excluded, with the
    reason. An image file that cannot be read raises OSError while iterating: that is not a property
    of the image.
    """
    classes = getattr(source, "classes", None)

    def identity() -> dict[str, Any]:
        known = {} if classes is None else {"classes": classes}
        return {"inputs": len(source), **known, "sha256": source.fingerprint()}

    return DataStream(
        batches=functools.partial(_batches, source, preprocess, decoding),
        length=len(source),
        identity=identity,
        ignored=source.ignored,
        classes=classes,
        spec=getattr(source, "spec", None),
    )


def available_cpus() -> int:
    """The number of CPUs that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Row(NamedTuple):
    """One row of a batch; `pixels` is None if there is no image, `reason` says why if it is bad."""

    number: int
    position: int = -1
    id: str = ""
    label: int = UNKNOWN
    pixels: np.ndarray | None = None
    reason: str = ""


def _batches(
    source: Source, preprocess: Preprocess, decoding: Decoding, schedule: BatchSchedule
) -> Iterator[HostBatch]:
    numbers, size = schedule.taken(len(source)), schedule.batch_size
    load = functools.partial(
        _load_row, source=source, preprocess=preprocess, numbers=numbers, size=size
    )
    collate = functools.partial(_collate, image_size=preprocess.size)
    rows = grain.MapDataset.range(len(numbers) * size).map(load)
    workers = decoding.workers or available_cpus()
    if not numbers:
        return iter(())
    if decoding.worker_processes:
        # Whole batches travel through shared memory, one waiting in each process.
        _parse_flags()
        dataset = (
            rows.batch(size, batch_fn=collate)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(
                grain.MultiprocessingOptions(min(workers, len(numbers)), per_worker_buffer_size=1)
            )
        )
        return _tidy_up(_iterate(dataset, len(numbers)))
    # Threads share images, not batches, so that all of them work on the batch needed next.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * size, workers))
    dataset = rows.to_iter_dataset(options).batch(size, batch_fn=collate)
    return _iterate(dataset, len(numbers))


def _load_row(
    slot: int, *, source: Source, preprocess: Preprocess, numbers: Sequence[int], size: int
) -> _Row:
    """Row `slot` of all rows of this process."""
    number = numbers[slot // size]
    position = number * size + slot % size
    if position >= len(source):
        return _Row(number)
    record = source[position]
    try:
        pixels = preprocess.pixels(decode_rgb(record.data))
    except BadImage as error:
        return _Row(number, position, record.id, record.label, reason=str(error))
    return _Row(number, position, record.id, record.label, pixels)


def _collate(rows: Sequence[_Row], *, image_size: int) -> HostBatch:
    nothing = np.zeros((image_size, image_size, 3), np.uint8)
    good = [row for row in rows if row.pixels is not None]
    return HostBatch(
        number=rows[0].number,
        data=np.stack([nothing if row.pixels is None else row.pixels for row in rows]),
        mask=np.array([row.pixels is not None for row in rows]),
        positions=np.array([row.position for row in good], np.int64),
        ids=[row.id for row in good],
        labels=np.array([row.label for row in good], np.int32),
        excluded=[Excluded(row.id, row.reason, row.position) for row in rows if row.reason],
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
