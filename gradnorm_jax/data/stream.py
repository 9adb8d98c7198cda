"""A data set as the evaluation reads it: batches of one size, whatever they come from."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gradnorm_jax.data.schedule import BatchSchedule

UNKNOWN = -1
"""The label of an input whose class is not known."""


class Excluded(NamedTuple):
    """An input that cannot be used.

    Attributes:
        id: what identifies it within its data set.
        reason: what is wrong with it.
        position: where in the data set; -1 if it was passed over by its name.
    """

    id: str
    reason: str
    position: int = -1


class HostBatch(NamedTuple):
    """One batch in host memory, of which N rows hold an input.

    Attributes:
        number: which batch of the data set this is.
        data: array `[B, ...]`, or a pytree of such, for the devices. Rows without an input are
            zeros.
        mask: `[B]` bool, whether the row holds an input.
        positions: `[N]` int64, where in the data set.
        ids: N ids.
        labels: `[N]` int32, -1 where unknown.
        excluded: what in this batch cannot be used.
    """

    number: int
    data: Any
    mask: np.ndarray
    positions: np.ndarray
    ids: Sequence[str]
    labels: np.ndarray
    excluded: Sequence[Excluded] = ()


@dataclasses.dataclass(frozen=True)
class DataStream:
    """A data set that can be read any number of times.

    Attributes:
        batches: the batches that a schedule takes, in its order.
        length: the number of positions; None if that is not known before all have been read.
        identity: describes the data set, as JSON, so that no other is mistaken for it.
        ignored: files that were passed over because their names are not those of images.
        classes: how many classes there are if labels are positions among them, as those of class
            folders are; None if labels are given as numbers.
        spec: what `open_source` takes to open it again; None for what is no image file.
    """

    batches: Callable[[BatchSchedule], Iterator[HostBatch]]
    length: int | None
    identity: Callable[[], dict[str, Any]]
    ignored: Sequence[str] = ()
    classes: int | None = None
    spec: str | None = None


def to_host_batch(
    number: int,
    data: Any,
    batch_size: int,
    ids: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
) -> HostBatch:
    """The batch of at most `batch_size` rows that all hold an input; ids are positions if None."""
    count = len(jax.tree.leaves(data)[0])
    positions = number * batch_size + np.arange(count)
    return HostBatch(
        number=number,
        data=jax.tree.map(lambda x: pad_rows(x, batch_size), data),
        mask=np.arange(batch_size) < count,
        positions=positions,
        ids=list(map(str, positions)) if ids is None else list(ids),
        labels=np.full(count, UNKNOWN, np.int32) if labels is None else labels.astype(np.int32),
    )


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """`array` `[N, ...]` with rows of zeros after its own, `[size, ...]`."""
    missing = size - len(array)
    if not missing:
        return array
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
