"""A pass over a data set: scores batch by batch, and what detectors learn from them."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from gradnorm_jax.data.preprocess import Prepare
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import DataStream, Excluded, HostBatch
from gradnorm_jax.detectors import Detector, Fit
from gradnorm_jax.evaluation.output_cache import OutputCache
from gradnorm_jax.evaluation.records import (
    FIT,
    Interrupted,
    ScoredBatch,
    ScoreTable,
    Statistics,
)
from gradnorm_jax.evaluation.sinks import FolderSink, MemorySink, Sink, StatisticsFiles
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
from gradnorm_jax.types import Model, head_parameters

Item = TypeVar("Item")


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
    return ScoredBatch(batch.number, mask, table, None if scored is None else scored.outputs)


def _check_finite(problem: str, ids: Sequence[str], finite: np.ndarray) -> None:
    if not finite.all():
        bad = list(itertools.compress(ids, ~finite))
        raise ValueError(
            f"{problem}, for {len(bad)} inputs of a batch ({', '.join(bad[:5])}): check the data, "
            "the weights and the preprocessing"
        )


def initial_statistics(fits: Mapping[str, Fit], model: Model) -> Statistics:
    """The statistics of no inputs."""
    if not fits:
        return {}
    kernel, _ = jax.eval_shape(head_parameters, model)
    return {name: fit.init(*kernel.shape) for name, fit in fits.items()}


def update_statistics(
    fits: Mapping[str, Fit], statistics: Statistics, batch: ScoredBatch
) -> Statistics:
    """The statistics with those of a batch."""
    if batch.outputs is None:
        return statistics
    outputs: Any = jax.tree.map(lambda x: np.asarray(x)[batch.mask], batch.outputs)
    return {
        name: fit.update(statistics[name], outputs, batch.table.labels)
        for name, fit in fits.items()
    }


def merge_statistics(fits: Mapping[str, Fit], left: Statistics, right: Statistics) -> Statistics:
    """The statistics of two disjoint sets of inputs together."""
    return {name: fit.merge(left[name], right[name]) for name, fit in fits.items()}


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
            return _checked(run, name, stream, table)
    for batch in score(name, stream, run.model, states, detectors, _without(run, sink.done())):
        sink.write(batch)
    table = sink.finish()
    if table is None and schedule.processes == 1:
        raise ValueError(f"{name} holds no input; give at least one")
    return None if table is None else _checked(run, name, stream, table)


def fit_data(
    run: Run, stream: DataStream, detectors: Sequence[Detector]
) -> tuple[States, Sequence[Excluded]]:
    """What all detectors that need it learn, in one pass, and the inputs that cannot be used."""
    fits = {d.name: d.fit for d in detectors if d.fit}
    statistics = initial_statistics(fits, run.model)
    done: frozenset[int] = frozenset()
    files, complete = None, False
    sink: Sink = MemorySink()
    if run.folder is not None:
        files = StatisticsFiles(run.folder, run.execution.schedule, statistics)
        sink = FolderSink(run.folder, FIT, run.execution.schedule, run.cache)
        complete, done, statistics = files.load(sink.done())
    if not complete:
        batches = (max(done, default=-1) + 1) * run.execution.schedule.batches_per_part
        for batch in score(FIT, stream, run.model, {}, (), _without(run, done)):
            statistics = update_statistics(fits, statistics, batch)
            sink.write(batch)
            batches = batch.number + 1
            if files is not None:
                files.save(batches, statistics)
        table = sink.finish()
        if files is not None:
            files.save(batches, statistics, complete=True)
    if files is not None:
        merge = functools.partial(merge_statistics, fits)
        statistics = files.merged(merge, run.wait_seconds, run.execution.should_stop)
        table = sink.finish()
    if table is None:
        raise ValueError(f"the training data ({FIT}) hold no input; give at least one")
    table = _checked(run, FIT, stream, table)
    return {name: fit.finalize(statistics[name]) for name, fit in fits.items()}, table.excluded


def read_data(run: Run, name: str, stream: DataStream) -> ScoreTable | None:
    """The scores that all processes have written of a data set; None if parts are missing."""
    if run.folder is None:
        return None
    table = read_table(run.folder, name, run.execution.schedule.part_size)
    return None if table is None else _checked(run, name, stream, table)


def _without(run: Run, done: frozenset[int]) -> Execution:
    schedule = dataclasses.replace(run.execution.schedule, done=done)
    return dataclasses.replace(run.execution, schedule=schedule)


def _checked(run: Run, name: str, stream: DataStream, table: ScoreTable) -> ScoreTable:
    """The table, with the files that were passed over; ValueError if too much is unusable."""
    check_excluded(name, table.excluded, stream.length, run.execution.max_undecodable)
    if not len(table.positions):
        first = "; the first: " + ": ".join(table.excluded[0][:2]) if table.excluded else ""
        raise ValueError(f"none of the inputs of {name} can be used{first}")
    reason = "not an image by its name or kind"
    ignored = [Excluded(to_utf8(file), reason) for file in stream.ignored]
    return table._replace(excluded=[*ignored, *table.excluded])
