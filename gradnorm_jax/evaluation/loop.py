"""A pass over a data set: scores batch by batch, kept in memory or in a folder."""

import dataclasses
import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from gradnorm_jax.data.preprocess import Prepare
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import DataStream, Excluded, HostBatch
from gradnorm_jax.detectors import Detector, Reading
from gradnorm_jax.evaluation.output_cache import OutputCache
from gradnorm_jax.evaluation.records import Interrupted, ScoredBatch, ScoreTable
from gradnorm_jax.evaluation.sinks import FolderSink, MemorySink, Sink
from gradnorm_jax.evaluation.step import (
    Placement,
    Scored,
    States,
    put_batch,
    put_states,
    score_batch,
)
from gradnorm_jax.evaluation.storage import Folder, read_table
from gradnorm_jax.progress import Track, no_progress
from gradnorm_jax.text import to_utf8
from gradnorm_jax.types import Model

Item = TypeVar("Item")
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How passes are carried out; no result depends on it.

    Attributes:
        placement: the devices.
        schedule: how batches are made and shared.
        preprocess: what makes the network's input.
        max_undecodable: the largest fraction of a data set that may turn out to be unusable,
            rounded up to a whole number of inputs.
        track: shows progress.
        should_stop: whether to stop after the present batch.
    """

    placement: Placement
    schedule: BatchSchedule
    preprocess: Prepare = None
    max_undecodable: float = 0.01
    track: Track = no_progress
    should_stop: Callable[[], bool] = bool


class Run(NamedTuple):
    """What all passes of an evaluation share.

    Attributes:
        model: the classifier, on the devices.
        execution: how passes are carried out.
        folder: where results are kept; None for memory.
        cache: where features and logits are kept as well.
        wait_seconds: how long to wait for other processes.
    """

    model: Model
    execution: Execution
    folder: Folder | None = None
    cache: OutputCache | None = None
    wait_seconds: float = 0.0


def score(
    name: str,
    stream: DataStream,
    model: Model,
    states: States,
    detectors: tuple[Detector, ...],
    execution: Execution,
    readings: tuple[Reading, ...] = (),
) -> Iterator[ScoredBatch]:
    """The scored batches that the schedule takes, with one always under way on the devices.

    Raises:
        ValueError: a score is not finite, too many inputs cannot be used, or there are none.
        Interrupted: `execution.should_stop` said so.
    """
    schedule, placement = execution.schedule, execution.placement
    total = None if stream.length is None else len(schedule.taken(stream.length))

    def start(batch: HostBatch) -> tuple[HostBatch, Scored | None]:
        if not batch.mask.any():
            return batch, None
        scored = score_batch(
            model,
            states,
            put_batch(batch.data, placement),
            detectors=detectors,
            preprocess=execution.preprocess,
            placement=placement,
            readings=readings,
        )
        return batch._replace(data=None), scored

    excluded: list[Excluded] = []
    is_empty = schedule.takes(0)
    batches = execution.track(stream.batches(schedule), name, total)
    for batch, scored in one_ahead(map(start, batches)):
        is_empty = is_empty and not (len(batch.positions) or batch.excluded)
        if is_empty:
            break
        excluded += batch.excluded
        check_excluded(name, excluded, stream.length, execution.max_undecodable)
        yield _to_scored_batch(name, batch, scored, detectors)
        if execution.should_stop():
            raise Interrupted("stopped; run the same command again to resume")
    if is_empty:
        raise ValueError(f"{name} holds no input; give at least one")


def one_ahead(started: Iterable[Item]) -> Iterator[Item]:
    """What has been started, each when the next has been started too."""
    return map(operator.itemgetter(0), itertools.pairwise(itertools.chain(started, [None])))


def check_excluded(
    name: str, excluded: Sequence[Excluded], length: int | None, max_undecodable: float
) -> None:
    """Raises ValueError if more than a fraction of `length` inputs could not be used."""
    count = sum(each.position >= 0 for each in excluded)
    if length is not None and count > (limit := math.ceil(max_undecodable * length)):
        listed = "; ".join(f"{each.id}: {each.reason}" for each in excluded[:3])
        raise ValueError(
            f"more than {limit} of the {length} images of {name} cannot be decoded: {listed}; mend "
            "or remove them, or allow more (max_undecodable)"
        )


def _to_scored_batch(
    name: str, batch: HostBatch, scored: Scored | None, detectors: Sequence[Detector]
) -> ScoredBatch:
    mask, predictions, scores = batch.mask, np.zeros(0, np.int32), {}
    if scored is None:
        scores = {detector.name: np.zeros(0, np.float32) for detector in detectors}
    else:
        found, values, finite = jax.device_get((scored.predictions, scored.scores, scored.finite))
        problem = f"the network's input, features or logits are not finite on {name}"
        _check_finite(problem, batch.ids, finite[mask])
        predictions = found[mask].astype(np.int32)
        scores = {key: value[mask] for key, value in values.items()}
    ids = list(map(to_utf8, batch.ids))
    excluded = [each._replace(id=to_utf8(each.id)) for each in batch.excluded]
    table = ScoreTable(batch.positions, ids, batch.labels, predictions, scores, excluded)
    for detector, column in scores.items():
        problem = f"{detector} gives scores that are not finite on {name}"
        _check_finite(problem, table.ids, np.isfinite(column))
    outputs, readings = (None, {}) if scored is None else (scored.outputs, scored.readings)
    return ScoredBatch(batch.number, mask, table, outputs, readings)


def _check_finite(problem: str, ids: Sequence[str], finite: np.ndarray) -> None:
    if not finite.all():
        bad = list(itertools.compress(ids, ~finite))
        raise ValueError(
            f"{problem}, for {len(bad)} inputs of a batch ({', '.join(bad[:5])}): check the data, "
            "the weights and the preprocessing"
        )


def score_data(
    run: Run, name: str, stream: DataStream, states: States, detectors: tuple[Detector, ...]
) -> ScoreTable | None:
    """The scores of a data set; None if other processes have not done their share."""
    schedule, states = run.execution.schedule, put_states(states, run.execution.placement)
    sink: Sink = MemorySink()
    if run.folder is not None:
        sink = FolderSink(run.folder, name, schedule, run.cache)
        table = sink.finish() if sink.is_whole() else None
        if table is not None:
            return checked(run, name, stream, table)
    for batch in score(name, stream, run.model, states, detectors, without(run, sink.done())):
        sink.write(batch)
    table = sink.finish()
    if table is None and schedule.processes == 1:
        raise ValueError(f"{name} holds no input; give at least one")
    return None if table is None else checked(run, name, stream, table)


def read_data(run: Run, name: str, stream: DataStream) -> ScoreTable | None:
    """The scores that all processes have written of a data set; None if parts are missing."""
    if run.folder is None:
        return None
    table = read_table(run.folder, name, run.execution.schedule.part_size)
    return None if table is None else checked(run, name, stream, table)


def without(run: Run, done: frozenset[int]) -> Execution:
    """How a pass is carried out that leaves out the parts that are done."""
    schedule = dataclasses.replace(run.execution.schedule, done=done)
    return dataclasses.replace(run.execution, schedule=schedule)


def checked(run: Run, name: str, stream: DataStream, table: ScoreTable) -> ScoreTable:
    """The table, with the files that were passed over; ValueError if too much is unusable."""
    _LOG.info("%s: %d inputs scored, %d excluded", name, len(table.positions), len(table.excluded))
    check_excluded(name, table.excluded, stream.length, run.execution.max_undecodable)
    if not len(table.positions):
        first = "; the first: " + ": ".join(table.excluded[0][:2]) if table.excluded else ""
        raise ValueError(f"none of the inputs of {name} can be used{first}")
    reason = "not an image by its name or kind"
    ignored = [Excluded(to_utf8(file), reason) for file in stream.ignored]
    return table._replace(excluded=[*ignored, *table.excluded])
