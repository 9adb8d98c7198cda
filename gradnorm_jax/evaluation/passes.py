"""A pass over a data set, to score it or to fit detectors to it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gradnorm_jax.data.split import Split
from gradnorm_jax.detectors import Detector, Fit
from gradnorm_jax.evaluation.hosts import smallest, split_evenly
from gradnorm_jax.evaluation.scoring import Feed, States, Step, Track, no_progress, run_steps
from gradnorm_jax.evaluation.table import Excluded, ScoreTable, concatenate
from gradnorm_jax.sharding import batch_mesh, local_rows, put_shared
from gradnorm_jax.types import Model, Outputs, head_parameters

Collect = Callable[[Feed, Split, Callable[[int], Iterator[Step]], Any], tuple[ScoreTable, Any]]
"""Carries a pass out and keeps what comes of it: `(feed, split, steps, zero) -> (table, sum)`.

`steps(start)` yields this process's steps from `start` on. The table holds the rows of all steps of
all processes; the sum, all their statistics added to `zero`.
"""


def in_memory(
    feed: Feed, split: Split, steps: Callable[[int], Iterator[Step]], zero: Any
) -> tuple[ScoreTable, Any]:
    """The `Collect` of a single process that keeps everything in memory.

    Raises:
        ValueError: there are several processes.
    """
    if split.processes > 1:
        raise ValueError(
            f"{split.processes} processes cannot share results kept in memory: evaluate into a "
            "folder that all of them see, with gradnorm_jax.evaluation.run.run"
        )
    tables = []
    for step in steps(0):
        tables.append(step.table)
        zero = add(zero, step.statistics)
    return concatenate(tables), zero


def add(left: Any, right: Any) -> Any:
    """The statistics of two sets of images together."""
    return jax.tree.map(np.add, left, right)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How passes are carried out; no result depends on it.

    Attributes:
        mesh: the devices, by default all with a copy of the model each; see `fitting_mesh`.
        batch_size: of all devices, rounded up to a multiple of their number.
        max_bad: the largest fraction of a set's images that may turn out to be undecodable,
            rounded up to a whole number of images.
        track: shows progress.
        collect: keeps what comes of a pass.
        stop_here: whether to stop after the present table cell, when all passes are done.
    """

    mesh: Mesh = dataclasses.field(default_factory=batch_mesh)
    batch_size: int = 64
    max_bad: float = 1.0
    track: Track[Any] = no_progress
    collect: Collect = in_memory
    stop_here: Callable[[], bool] = bool


def fitting_mesh(model: Model, devices_per_copy: int | Literal["auto"] = "auto") -> Mesh:
    """All devices, of which so many share a copy of the model that it fits.

    Args:
        model: the classifier; its arrays may be NumPy's.
        devices_per_copy: how many devices hold a copy between them. "auto" is as few as need no
            more than half of their memory for it, which leaves the rest to the computation; 1 where
            devices do not tell how much they have, as CPUs do not.

    Raises:
        ValueError: the devices cannot be divided into groups of that size.
    """
    if devices_per_copy == "auto":
        count = jax.device_count()
        devices_per_copy = count // smallest(_copies_that_fit(model, count))
    return batch_mesh(devices_per_copy=devices_per_copy)


def _copies_that_fit(model: Model, devices: int) -> int:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    room = devices * min(each.get("bytes_limit", math.inf) for each in stats) / 2
    size = sum(array.nbytes for array in jax.tree.leaves(model))
    fitting = (n for n in range(1, devices + 1) if devices % n == 0 and n * size <= room)
    return max(fitting, default=1)


class Fitted(NamedTuple):
    """What detectors have learned from in-distribution training images.

    Attributes:
        states: by name of the detector, for those that are fitted.
        excluded: the files that are not, or could not be decoded as, images.
    """

    states: States
    excluded: list[Excluded]


def score_feed(
    model: Model,
    states: States,
    feed: Feed,
    detectors: tuple[Detector, ...],
    execution: Execution,
) -> ScoreTable:
    """Scores every image of a data set.

    Args:
        model: the classifier; where several devices share a copy, or there are several processes,
            from `put_shared`.
        states: of the detectors that are fitted.
        feed: the data set.
        detectors: those to compute.
        execution: how.

    Raises:
        ValueError: a score is not finite, or too many images, or all, could not be decoded.
    """
    states = put_shared(execution.mesh, states)
    table, _ = _carry_out(model, states, feed, detectors, {}, execution)
    return table


def fit_feed(
    model: Model, feed: Feed, detectors: Sequence[Detector], execution: Execution
) -> Fitted:
    """Fits all detectors that need it, in one pass over labelled training images.

    Raises:
        ValueError: an image has no label within the network's classes, there are too few, or too
            many could not be decoded.
    """
    fits = {d.name: d.fit for d in detectors if d.fit}
    table, statistics = _carry_out(model, {}, feed, (), fits, execution)
    states = {name: fit.finalize(statistics[name]) for name, fit in fits.items()}
    return Fitted(states, table.excluded)


def _carry_out(
    model: Model,
    states: States,
    feed: Feed,
    detectors: tuple[Detector, ...],
    fits: dict[str, Fit],
    execution: Execution,
) -> tuple[ScoreTable, dict[str, Any]]:
    split = split_evenly(
        execution.batch_size, execution.mesh.size, jax.process_index(), jax.process_count()
    )
    run = functools.partial(
        run_steps,
        feed,
        model,
        states,
        detectors=detectors,
        mesh=execution.mesh,
        split=split,
        track=execution.track,
    )
    limit = math.ceil(execution.max_bad * feed.length)

    def steps(start: int) -> Iterator[Step]:
        excluded: list[Excluded] = []
        for step in run(start=start):
            excluded += step.table.excluded
            _check_bad(excluded, limit, feed)
            yield step._replace(statistics=_learn(step, fits)) if fits else step

    table, statistics = execution.collect(feed, split, steps, _know_nothing(model, fits))
    _check_bad(table.excluded, limit, feed)
    if not table.ids:
        raise ValueError(
            f"none of the {feed.length} images of {feed.name} could be decoded; the first: "
            f"{_describe(table.excluded[:1])}"
        )
    ignored = [Excluded(file, "not an image by its name") for file in feed.ignored]
    return table._replace(excluded=ignored + table.excluded), statistics


def _learn(step: Step, fits: dict[str, Fit]) -> dict[str, Any]:
    """The statistics of this process's images."""
    outputs: Any = Outputs._make(local_rows(array)[step.mask] for array in step.outputs)
    return {name: fit.update(outputs, step.table.labels) for name, fit in fits.items()}


def _know_nothing(model: Model, fits: dict[str, Fit]) -> dict[str, Any]:
    """The statistics of no images, to which those of others are added."""
    kernel, _ = head_parameters(model)
    nothing: Any = Outputs._make(np.zeros((0, size), np.float32) for size in kernel.shape)
    return {name: fit.update(nothing, np.zeros(0, np.int32)) for name, fit in fits.items()}


def _check_bad(excluded: Sequence[Excluded], limit: int, feed: Feed) -> None:
    if len(excluded) > limit:
        raise ValueError(
            f"more than {limit} of the {feed.length} images of {feed.name} cannot be decoded: "
            f"{_describe(excluded[:3])}; mend or remove them, or allow more (--max-bad)"
        )


def _describe(excluded: Iterable[Excluded]) -> str:
    return "; ".join(f"{each.id}: {each.reason}" for each in excluded)
