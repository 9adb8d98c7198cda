"""What is learned from in-distribution data: records that one streaming pass feeds, and merge."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradnorm_jax.types import LinearHead


class Examples(NamedTuple):
    """A block of training inputs as statistics see it, in NumPy on the host.

    Attributes:
        features: `[B, D]`, the input of the last layer.
        logits: `[B, C]`.
        labels: `[B]` int32, -1 where unknown.
        positions: `[B]` int64, where in the data set each is: what samples are drawn by, so that
            they do not depend on batches, order and processes.
    """

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


def _nothing(value: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Something that is learned in one pass over the data, and shared by all that asks for it.

    Values are pytrees of NumPy arrays. Shapes may grow, the number of leaves may not change.
    Statistics compare by their functions: make them constants of a module, or let a cached function
    return them, so that equal ones are learned once.

    Attributes:
        name: what errors call it.
        init: `(head, *values of after) -> value` of no inputs.
        update: `(value, examples) -> value` with one more block; the value before stays as it was.
        merge: `(value, value) -> value` of two disjoint sets of inputs together: whatever the split
            and the order, the value of both up to rounding.
        after: statistics of an earlier pass that `init` is given, such as the mean or the range of
            what is then counted.
        remark: a sentence on what a value leaves out, if it does, for reports.
        needs_labels: whether `update` takes labelled examples only.
    """

    name: str
    init: Callable[..., Any]
    update: Callable[[Any, Examples], Any]
    merge: Callable[[Any, Any], Any]
    after: tuple["Statistic", ...] = ()
    remark: Callable[[Any], str | None] = _nothing
    needs_labels: bool = False


def passes(statistics: Iterable[Statistic]) -> list[tuple[Statistic, ...]]:
    """The statistics, and those that they come after, by the pass that each is learned in."""
    levels: dict[Statistic, int] = {}

    def place(statistic: Statistic) -> int:
        if statistic not in levels:
            levels[statistic] = max(map(place, statistic.after), default=-1) + 1
        return levels[statistic]

    deepest = max(map(place, statistics), default=-1)
    return [tuple(s for s in levels if levels[s] == level) for level in range(deepest + 1)]


def init_all(
    statistics: Sequence[Statistic], head: LinearHead, known: Mapping[Statistic, Any]
) -> list[Any]:
    """The values of no inputs, where the statistics of earlier passes are `known`."""
    return [s.init(head, *(known[each] for each in s.after)) for s in statistics]


def learn(
    statistics: Iterable[Statistic], head: LinearHead, blocks: Sequence[Examples]
) -> dict[Statistic, Any]:
    """The values of statistics, and of those that they come after, of examples in memory.

    >>> known = learn([MOMENTS], head, [Examples(features, logits, labels, np.arange(len(labels)))])
    """
    known: dict[Statistic, Any] = {}
    for level in passes(statistics):
        values = init_all(level, head, known)
        for block in blocks:
            values = [s.update(value, block) for s, value in zip(level, values, strict=True)]
        known |= zip(level, values, strict=True)
    return known
