"""Image files by their names, as these come: decoded in threads, ahead of the devices."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gradnorm_jax.data.folder_source import folder_source
from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.stream import UNKNOWN, Excluded, HostBatch

File = str | Excluded
"""The name of a file, or of one that cannot be used."""


def expand_folders(names: Iterable[str]) -> Iterator[File]:
    """The names of files, with those of all images in a folder in place of its name.

    A folder without an image, or one that cannot be read, is excluded.
    """
    for name in names:
        if not Path(name).is_dir():
            yield name
            continue
        try:
            source = folder_source(name)
        except (OSError, ValueError) as error:
            yield Excluded(name, str(error))
            continue
        yield from (str(source.root / each) for each in source.ids)


def image_batches(
    files: Iterable[File], preprocess: Preprocess, batch_size: int, workers: int
) -> Iterator[HostBatch]:
    """Batches of images in the order of their names, the next decoded while one is used.

    What cannot be read or decoded is excluded, with the reason.
    """
    numbers = itertools.count()
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[tuple[int, list[Future[np.ndarray | Excluded]], list[File]]]
        waiting = collections.deque()
        try:
            for chunk in _chunks(files, batch_size):
                decoded = [pool.submit(_decode, each, preprocess) for each in chunk]
                waiting.append((next(numbers), decoded, chunk))
                if len(waiting) > 1:
                    yield _collate(*waiting.popleft(), batch_size, preprocess.size)
            while waiting:
                yield _collate(*waiting.popleft(), batch_size, preprocess.size)
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(files: Iterable[File], size: int) -> Iterator[list[File]]:
    iterator = iter(files)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _decode(file: File, preprocess: Preprocess) -> np.ndarray | Excluded:
    if isinstance(file, Excluded):
        return file
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            return Excluded(file, "it is no regular file")  # reading a pipe may never end
        return preprocess.pixels(decode_rgb(path.read_bytes()))
    except BadImage as error:
        return Excluded(file, str(error))
    except OSError as error:
        return Excluded(file, error.strerror or str(error))


def _collate(
    number: int,
    decoded: Sequence[Future[np.ndarray | Excluded]],
    files: Sequence[File],
    batch_size: int,
    image_size: int,
) -> HostBatch:
    data = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    mask = np.zeros(batch_size, bool)
    excluded = []
    for row, each in enumerate(future.result() for future in decoded):
        position = number * batch_size + row
        if isinstance(each, Excluded):
            excluded.append(each._replace(position=position))
        else:
            data[row], mask[row] = each, True
    used = np.flatnonzero(mask)
    return HostBatch(
        number=number,
        data=data,
        mask=mask,
        positions=number * batch_size + used,
        ids=[str(file) for file, is_used in zip(files, mask, strict=False) if is_used],
        labels=np.full(len(used), UNKNOWN, np.int32),
        excluded=excluded,
    )
