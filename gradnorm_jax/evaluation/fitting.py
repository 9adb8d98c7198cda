"""What detectors learn from training data: passes that they share, each resumed and merged."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gradnorm_jax.data.stream import DataStream, Excluded
from gradnorm_jax.detectors import Detector
from gradnorm_jax.evaluation.loop import Run, checked, score, without
from gradnorm_jax.evaluation.output_cache import cached_stream
from gradnorm_jax.evaluation.records import FIT, ScoredBatch, concatenate
from gradnorm_jax.evaluation.sinks import FolderSink, MemorySink, Sink, StatisticsFiles
from gradnorm_jax.evaluation.step import States
from gradnorm_jax.statistics.statistic import Examples, Statistic, init_all, passes
from gradnorm_jax.types import LinearHead, Outputs, linear_head, on_host


class Learned(NamedTuple):
    """What follows from training data.

    Attributes:
        states: what detectors have learned, by their names.
        excluded: the inputs that cannot be used.
        remarks: a sentence on each thing that the statistics leave out.
    """

    states: States
    excluded: Sequence[Excluded] = ()
    remarks: Sequence[str] = ()


def fit_data(run: Run, stream: DataStream, detectors: Sequence[Detector]) -> Learned:
    """What all detectors that need it learn."""
    fits = {d.name: d.fit for d in detectors if d.fit}
    head = on_host(linear_head(run.model)) if fits else LinearHead(None, None)
    first, *later = passes(s for fit in fits.values() for s in fit.statistics) or [()]
    sink: Sink = MemorySink()
    if run.folder is not None:
        sink = FolderSink(run.folder, FIT, run.execution.schedule, run.cache)
    known = _learn(run, stream, "statistics", first, init_all(first, head, {}), sink)
    table = sink.finish()
    if table is None:
        raise ValueError(f"the training data ({FIT}) hold no input; give at least one")
    for number, statistics in enumerate(later, 2):
        zero = init_all(statistics, head, known)
        known |= _learn(run, _again(run, stream), f"statistics_{number}", statistics, zero, None)
    states = {
        name: fit.finalize(head, *(known[s] for s in fit.statistics)) for name, fit in fits.items()
    }
    remarks = dict.fromkeys(filter(None, (s.remark(value) for s, value in known.items())))
    return Learned(states, checked(run, FIT, stream, table).excluded, list(remarks))


def _again(run: Run, stream: DataStream) -> DataStream:
    """The training data for a later pass: their outputs, where these are kept without loss."""
    if run.folder is None or run.cache is None or run.cache.dtype != "float32":
        return stream
    return cached_stream(run.folder, FIT, run.execution.schedule.part_size, stream.classes)


def _learn(
    run: Run,
    stream: DataStream,
    name: str,
    statistics: Sequence[Statistic],
    zero: list[Any],
    sink: Sink | None,
) -> dict[Statistic, Any]:
    """The values of statistics over the shares of all processes, in one pass.

    Args:
        run: what all passes share.
        stream: the training data.
        name: of the pass.
        statistics: what is learned.
        zero: their values of no inputs.
        sink: takes the scored batches; None if an earlier pass has written them.
    """
    values = zero
    if run.folder is None:
        for _, block in _parts(run, stream, frozenset(), sink):
            values = _update(statistics, values, block)
        return dict(zip(statistics, values, strict=True))
    files = StatisticsFiles(run.folder, name, run.execution.schedule, zero)
    complete, done, values = files.load(None if sink is None else sink.done())
    if not complete:
        batches = (max(done, default=-1) + 1) * run.execution.schedule.batches_per_part
        for batches, block in _parts(run, stream, done, sink):
            values = _update(statistics, values, block)
            files.save(batches, values)
        if sink is not None:
            sink.finish()
        files.save(batches, values, complete=True)

    def merge(left: list[Any], right: list[Any]) -> list[Any]:
        return [s.merge(*both) for s, *both in zip(statistics, left, right, strict=True)]

    values = files.merged(merge, run.wait_seconds, run.execution.should_stop)
    return dict(zip(statistics, values, strict=True))


def _parts(
    run: Run, stream: DataStream, done: frozenset[int], sink: Sink | None
) -> Iterator[tuple[int, list[ScoredBatch]]]:
    """The scored batches of each part, and how many batches of the data set come before the next.

    Statistics are large, and cost less when they take in a part at a time.
    """
    batches: list[ScoredBatch] = []
    for batch in score(FIT, stream, run.model, {}, (), without(run, done)):
        if sink is not None:
            sink.write(batch)
        batches.append(batch)
        if (batch.number + 1) % run.execution.schedule.batches_per_part == 0:
            yield batch.number + 1, batches
            batches = []
    if batches:
        yield batches[-1].number + 1, batches


def _update(
    statistics: Sequence[Statistic], values: list[Any], batches: Sequence[ScoredBatch]
) -> list[Any]:
    known = [(batch.outputs, batch.mask) for batch in batches if batch.outputs is not None]
    if not (statistics and known):
        return values
    features, logits = (
        np.concatenate([_at_least_float32(getattr(outputs, kind))[mask] for outputs, mask in known])
        for kind in Outputs._fields
    )
    table = concatenate([batch.table for batch in batches])
    examples = Examples(features, logits, table.labels, table.positions)
    return [s.update(value, examples) for s, value in zip(statistics, values, strict=True)]


def _at_least_float32(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.promote_types(x.dtype, np.float32))
