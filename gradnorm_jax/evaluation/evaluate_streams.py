"""An evaluation from data streams to its result: fit, score, compare, report."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from gradnorm_jax.data.preprocess import Prepare
from gradnorm_jax.data.schedule import make_schedule
from gradnorm_jax.data.stream import DataStream
from gradnorm_jax.detectors import Detector, feature_norm, msp, residual_norm
from gradnorm_jax.evaluation.checks import (
    cannot_run,
    check_limits,
    check_options,
    check_parameters,
    check_sharing,
    find_accuracy,
    same_data,
)
from gradnorm_jax.evaluation.fitting import Learned, fit_data
from gradnorm_jax.evaluation.journal import keep_journal
from gradnorm_jax.evaluation.loop import Execution, Run, read_data, score_data
from gradnorm_jax.evaluation.output_cache import OutputCache, write_head
from gradnorm_jax.evaluation.records import FIT, ID, ScoreTable, Unfinished, select_scores
from gradnorm_jax.evaluation.report import write_report
from gradnorm_jax.evaluation.result import Result
from gradnorm_jax.evaluation.run_config import claimed, describe_run
from gradnorm_jax.evaluation.step import States, place_model
from gradnorm_jax.evaluation.storage import open_folder
from gradnorm_jax.metrics import Metrics, evaluate_scores
from gradnorm_jax.progress import Track, show_progress
from gradnorm_jax.types import Model


def evaluate_streams(
    model: Model,
    streams: Mapping[str, DataStream],
    detectors: tuple[Detector, ...],
    preprocess: Prepare,
    *,
    out: str | os.PathLike[str] | None,
    batch_size: int,
    facts: Mapping[str, Any],
    max_undecodable: float,
    progress: bool | Track | None,
    should_stop: Callable[[], bool],
    not_run: Mapping[str, str] | None = None,
    cache: str | None = None,
    mesh: Mesh | None = None,
    process: tuple[int, int] = (0, 1),
    wait_seconds: float = 0.0,
) -> Result:
    """Evaluates detectors on data streams: fits them, scores, compares and reports.

    It takes what `evaluate` takes, but for `streams`, the data sets by name, "ID" and, if there are
    training data, "fit" among them; `facts`, what decides the results beside the other arguments;
    and `not_run`, why detectors are left out already, by their names.
    """
    check_limits(batch_size, max_undecodable)
    check_sharing(process, wait_seconds, out, cache)
    not_run = dict(not_run or {}) | cannot_run(detectors, model, streams.get(FIT))
    runnable = tuple(d for d in detectors if d.name not in not_run)
    recorded = () if out is None else _recorded(runnable, model)
    if not runnable:
        reasons = "; ".join(f"{name}: {why}" for name, why in not_run.items())
        raise ValueError(f"none of the detectors can be run: {reasons}")
    for name, stream in streams.items():
        if stream.length == 0:
            raise ValueError(f"{name} holds no input; give at least one")
    check_parameters(model)
    check_options(runnable, model)
    placed, placement = place_model(model, mesh)
    schedule = make_schedule(
        batch_size, placement.mesh.size, (s.length for s in streams.values()), process
    )
    folder = None if out is None else open_folder(out)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            facts = dict(facts) | {
                "recorded": [d.name for d in recorded],
                "batch_size": schedule.batch_size,
                "batches_per_part": schedule.batches_per_part,
                "processes": schedule.processes,
            }
            config = describe_run(model, streams, detectors, preprocess, facts)
            stack.enter_context(claimed(folder, config))
        track = stack.enter_context(show_progress(progress))
        if folder is not None:
            sources = {name: stream.spec for name, stream in streams.items()}
            track = stack.enter_context(keep_journal(folder, sources, process, track))
        execution = Execution(placement, schedule, preprocess, max_undecodable, track, should_stop)
        kept = OutputCache(folder, cache) if folder is not None and cache else None
        run = Run(placed, execution, folder, kept, wait_seconds)
        result = _evaluate(run, streams, runnable, recorded, not_run, facts["label_offset"])
        if folder is not None:
            if kept is not None:
                write_head(folder, model)
            write_report(folder, result)
    return result


def _evaluate(
    run: Run,
    streams: Mapping[str, DataStream],
    detectors: tuple[Detector, ...],
    recorded: tuple[Detector, ...],
    not_run: Mapping[str, str],
    label_offset: int,
) -> Result:
    learned = Learned({})
    if FIT in streams and (run.cache is not None or any(d.fit for d in detectors)):
        learned = fit_data(run, streams[FIT], detectors)
    tables = _score(run, streams, learned.states, tuple(dict.fromkeys([*detectors, *recorded])))
    found = {name: select_scores(t, [d.name for d in detectors]) for name, t in tables.items()}
    metrics = _compare(found, run.execution.track)
    accuracy, doubts = find_accuracy(found[ID], run.model, label_offset, streams[ID].classes)
    warnings = [*same_data(streams), *doubts, *learned.remarks]
    return Result(found, metrics, accuracy, not_run, learned.excluded, warnings)


def _score(
    run: Run, streams: Mapping[str, DataStream], states: States, detectors: tuple[Detector, ...]
) -> dict[str, ScoreTable]:
    """The scores of all data sets but the training data."""
    tables = {
        name: score_data(run, name, stream, states, detectors)
        for name, stream in streams.items()
        if name != FIT
    }
    # What others have finished meanwhile: only so does the last process find everything.
    tables = {
        name: read_data(run, name, streams[name]) if table is None else table
        for name, table in tables.items()
    }
    found = {name: table for name, table in tables.items() if table is not None}
    if len(found) < len(tables):
        schedule = run.execution.schedule
        raise Unfinished(
            f"process {schedule.process} of {schedule.processes} has done its share; the last to "
            "finish writes the report"
        )
    return found


def _compare(tables: Mapping[str, ScoreTable], track: Track) -> dict[str, dict[str, Metrics]]:
    """The metrics by detector and OOD set."""
    detectors = list(tables[ID].scores)
    cells = [(detector, name) for detector in detectors for name in tables if name != ID]
    metrics: dict[str, dict[str, Metrics]] = {detector: {} for detector in detectors}
    for detector, name in track(cells, "metrics", len(cells)):
        id_scores, ood_scores = (tables[each].scores[detector] for each in (ID, name))
        metrics[detector][name] = evaluate_scores(id_scores, ood_scores)
    return metrics


def _recorded(detectors: Sequence[Detector], model: Model) -> tuple[Detector, ...]:
    """What is kept of each input for reports: confidence and, if it has them, GradNorm's factors.

    One whose name another detector has is left out.
    """
    wanted = [msp(), feature_norm(), residual_norm()] if model.head is not None else [msp()]
    taken = {d.name: d for d in detectors}
    return tuple(d for d in wanted if taken.get(d.name, d) == d)
