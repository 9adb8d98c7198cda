"""The main job: scores of ID and OOD inputs by all detectors, and how well they separate them."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.preprocess import Prepare, get_preprocess
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import DataStream
from gradnorm_jax.detectors import (
    Detector,
    feature_norm,
    msp,
    parse_detectors,
    residual_norm,
)
from gradnorm_jax.evaluation.checks import (
    cannot_run,
    check_options,
    check_parameters,
    find_accuracy,
    same_data,
)
from gradnorm_jax.evaluation.fitting import Learned, fit_data
from gradnorm_jax.evaluation.journal import keep_journal
from gradnorm_jax.evaluation.loop import Execution, Run, read_data, score_data
from gradnorm_jax.evaluation.output_cache import OutputCache, cached_stream, read_head, write_head
from gradnorm_jax.evaluation.records import (
    FIT,
    ID,
    ScoreTable,
    Unfinished,
    select_scores,
)
from gradnorm_jax.evaluation.result import Result
from gradnorm_jax.evaluation.run_config import (
    CONFIG,
    claim_folder,
    describe_run,
    read_config,
)
from gradnorm_jax.evaluation.sinks import write_report
from gradnorm_jax.evaluation.step import States, place_model
from gradnorm_jax.evaluation.storage import Folder, open_folder
from gradnorm_jax.metrics import evaluate_scores
from gradnorm_jax.progress import Track, show_progress
from gradnorm_jax.types import Model

DEFAULT_DETECTORS = ("msp", "odin", "mahalanobis", "energy", "gradnorm")
"""The detectors of the paper's Table 1."""

PART_SIZE = 256
"""About how many inputs a part of a run folder holds: the most that a killed run loses."""


def evaluate(
    model: Model,
    id_data: Any,
    ood_data: Mapping[str, Any],
    *,
    detectors: Iterable[str | Detector] = DEFAULT_DETECTORS,
    fit: Any = None,
    preprocess: Prepare | str = None,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    cache: Literal["float32", "bfloat16"] | None = None,
    batch_size: int = 64,
    label_offset: int = 0,
    max_undecodable: float = 0.01,
    mesh: Mesh | None = None,
    process: tuple[int, int] = (0, 1),
    wait_seconds: float = 3600.0,
    progress: bool | Track | None = None,
    should_stop: Callable[[], bool] = bool,
) -> Result:
    """Evaluates detectors on an in-distribution (ID) set against out-of-distribution (OOD) sets.

    All detectors that need only features and logits come from one forward pass, on all devices.

    >>> result = evaluate(model, (images, labels), {"svhn": svhn_images}, detectors=["gradnorm"])
    >>> print(result)
    >>> result["gradnorm", "svhn"].auroc.value

    A data set is any of: an array `[N, ...]` of inputs as the network takes them, or a pair of it
    and labels `[N]`; a loader of batches, or a function that returns one (Grain, `tf.data`,
    PyTorch, Hugging Face, a list), which yields arrays, pairs, or mappings with `image` and, if
    there are any, `label`, `id` and `mask`; a folder of images, or another string that names files
    on the command line (`csv:FILE`, `tfds:NAME:SPLIT`); a `Source` or a `DataStream`.

    With `out`, results are kept in a folder: scores (Parquet), metrics (JSON), a report (Markdown)
    and histograms (PNG); `gradnorm_jax.report` makes a page of them. Beside the scores it keeps the
    confidence and GradNorm's factors of each input. A run that was interrupted resumes when the
    same call is made again; its files come out the same to the byte, but for a journal of times. A
    folder that holds another run is refused, and the difference named. Several processes share a
    run, each with devices of its own, by nothing but the folder.

    Args:
        model: the classifier, from `from_linen`, `from_nnx`, `from_apply` or `models.load_model`.
        id_data: in-distribution test data.
        ood_data: out-of-distribution data by the name of their set.
        detectors: names, such as "gradnorm(ord=2)", or `Detector` objects.
        fit: in-distribution training data, with labels for detectors that need them. Without it
            detectors that are fitted are not run; without labels those of `all` that need them.
        preprocess: what image files need: a `Preprocess`, its name, or one composed as on the
            command line. It applies to uint8 arrays as well, image by image. Or a function of a
            batch `[B, ...]` that makes the network's input on the device.
        out: folder for the results: new, empty, or of the same run. A path, or a URL (`gs://`).
        name: identifies the model in the run folder, beside a hash of its arrays: say here what its
            arrays do not tell, such as the precision that it computes in.
        cache: keep features and logits in the folder too, in this precision; see `evaluate_cache`.
        batch_size: of all devices; no result depends on it, up to rounding.
        label_offset: class k is logit k + label_offset; it matters to the accuracy alone.
        max_undecodable: the largest fraction of a set's images that may be undecodable. They are
            listed and left out.
        mesh: the devices to use, by default all of this process. Parameters that are spread over
            devices already stay as they are, and their mesh is used.
        process: `(i, n)`: this process is number i of n that share the run through `out`.
        wait_seconds: how long to wait for the other processes, between fitting and scoring.
        progress: True or False for bars or none, a function `(items, description, total) -> items`
            for another kind; by default bars in a terminal or a notebook.
        should_stop: whether to stop after the present batch; then the call raises `Interrupted`.

    Returns:
        The result.

    Raises:
        ValueError: an argument is wrong, no detector can be run, a score is not finite, or a set
            has no usable input.
        OSError: a file cannot be read or written, or the folder holds something else.
        Interrupted: it was stopped, or another process has not finished fitting in time.
        Unfinished: this process has done its share, and others have not.
    """
    chosen = parse_detectors(detectors)
    prepare = get_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    _check_names(ood_data)
    streams = {
        key: as_stream(data, prepare, name=key) for key, data in {ID: id_data, **ood_data}.items()
    }
    if fit is not None and (cache or any(d.fit for d in chosen)):
        streams[FIT] = as_stream(fit, prepare, name=FIT)
    return _evaluate(
        model,
        streams,
        chosen,
        prepare,
        out=out,
        cache=cache,
        batch_size=batch_size,
        facts={"model": name, "label_offset": label_offset, "cache": cache},
        max_undecodable=max_undecodable,
        mesh=mesh,
        process=process,
        wait_seconds=wait_seconds,
        progress=progress,
        should_stop=should_stop,
    )


def evaluate_cache(
    run: str | os.PathLike[str],
    *,
    detectors: Iterable[str | Detector] = DEFAULT_DETECTORS,
    out: str | os.PathLike[str] | None = None,
    progress: bool | Track | None = None,
    should_stop: Callable[[], bool] = bool,
) -> Result:
    """Evaluates detectors on what an earlier run kept with `cache`, without network or images.

    Args:
        run: the folder of the earlier run.
        detectors: those that need no more than features and logits; the others are not run.
        out: folder for the results.
        progress: see `evaluate`.
        should_stop: see `evaluate`.

    Raises:
        ValueError: as in `evaluate`, or a file of the cache is damaged or missing.
        FileNotFoundError: the folder holds no cache.
    """
    folder = open_folder(run)
    config = read_config(folder)
    if config is None or not config.get("cache"):
        raise FileNotFoundError(f"{folder.address} holds no run with a cache; evaluate with one")
    chosen = parse_detectors(detectors)
    try:
        batch_size, label_offset = int(config["batch_size"]), int(config["label_offset"])
        part_size = batch_size * int(config["batches_per_part"])
        classes = {name: each.get("classes") for name, each in config["data"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.address}/{CONFIG} is damaged; run the command that wrote it in a new folder"
        ) from error
    return _evaluate(
        read_head(folder),
        {
            key: cached_stream(folder, key, part_size, number)
            for key, number in classes.items()
            if key != FIT or any(d.fit for d in chosen)
        },
        chosen,
        None,
        out=out,
        batch_size=batch_size,
        facts={"of": config, "label_offset": label_offset, "cache": None},
        not_run={
            d.name: "it runs the network, of which the cache holds only the outputs"
            for d in chosen
            if d.needs == "network"
        },
        max_undecodable=1.0,
        progress=progress,
        should_stop=should_stop,
    )


def fit_states(
    model: Model,
    data: Any,
    detectors: Sequence[Detector],
    *,
    preprocess: Prepare | str = None,
    batch_size: int = 64,
    progress: bool | Track | None = None,
) -> States:
    """What detectors learn from training data, by their names, in memory; see `evaluate`."""
    prepare = get_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    stream = as_stream(data, prepare, name=FIT)
    with _in_memory(model, stream, prepare, batch_size, progress) as run:
        learned = fit_data(run, stream, detectors)
    for remark in learned.remarks:
        logging.getLogger(__name__).warning(remark)
    return learned.states


def score_set(
    name: str,
    model: Model,
    stream: DataStream,
    detector: Detector,
    state: Any,
    *,
    preprocess: Prepare = None,
    batch_size: int = 64,
    max_undecodable: float = 0.01,
    progress: bool | Track | None = None,
) -> ScoreTable:
    """The scores of one data set by one detector, in memory; see `evaluate`."""
    check_options([detector], model)
    with _in_memory(model, stream, preprocess, batch_size, progress, max_undecodable) as run:
        table = score_data(run, name, stream, {detector.name: state}, (detector,))
    assert table is not None  # there is no other process
    return table


@contextlib.contextmanager
def _in_memory(
    model: Model,
    stream: DataStream,
    preprocess: Prepare,
    batch_size: int,
    progress: bool | Track | None,
    max_undecodable: float = 0.01,
) -> Iterator[Run]:
    _check_options(batch_size, max_undecodable, (0, 1), 0.0, None, None)
    check_parameters(model)
    placed, placement = place_model(model)
    schedule = _make_schedule(batch_size, placement.mesh.size, [stream], (0, 1))
    with show_progress(progress) as track:
        yield Run(placed, Execution(placement, schedule, preprocess, max_undecodable, track))


def _evaluate(
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
    _check_options(batch_size, max_undecodable, process, wait_seconds, out, cache)
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
    schedule = _make_schedule(batch_size, placement.mesh.size, streams.values(), process)
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
            stack.enter_context(_held(folder, config))
        track = stack.enter_context(show_progress(progress))
        if folder is not None:
            sources = {name: stream.spec for name, stream in streams.items()}
            track = stack.enter_context(keep_journal(folder, sources, process, track))
        execution = Execution(placement, schedule, preprocess, max_undecodable, track, should_stop)
        kept = OutputCache(folder, cache) if folder is not None and cache else None
        run = Run(placed, execution, folder, kept, wait_seconds)
        learned = Learned({})
        if FIT in streams and (kept is not None or any(d.fit for d in runnable)):
            learned = fit_data(run, streams[FIT], runnable)
        scored = tuple(dict.fromkeys([*runnable, *recorded]))
        tables = {
            name: score_data(run, name, stream, learned.states, scored)
            for name, stream in streams.items()
            if name != FIT
        }
        # What others have finished meanwhile: only so does the last process find everything.
        tables = {
            name: read_data(run, name, streams[name]) if table is None else table
            for name, table in tables.items()
        }
        found, metrics = _compare(run, tables, runnable)
        accuracy, doubts = find_accuracy(
            found[ID], model, facts["label_offset"], streams[ID].classes
        )
        warnings = [*same_data(streams), *doubts, *learned.remarks]
        result = Result(found, metrics, accuracy, not_run, learned.excluded, warnings)
        if folder is not None:
            if kept is not None:
                write_head(folder, model)
            write_report(folder, result)
    return result


def _compare(
    run: Run,
    tables: Mapping[str, ScoreTable | None],
    detectors: Sequence[Detector],
) -> tuple[Mapping[str, ScoreTable], dict[str, dict[str, Any]]]:
    names = [d.name for d in detectors]
    found = {
        name: select_scores(table, names) for name, table in tables.items() if table is not None
    }
    if len(found) < len(tables):
        process, processes = run.execution.schedule.process, run.execution.schedule.processes
        raise Unfinished(
            f"process {process} of {processes} has done its share; the last to finish writes the "
            "report"
        )
    cells = [(detector, name) for detector in names for name in found if name != ID]
    metrics: dict[str, dict[str, Any]] = {detector: {} for detector in names}
    for detector, name in run.execution.track(cells, "metrics", len(cells)):
        metrics[detector][name] = evaluate_scores(
            found[ID].scores[detector], found[name].scores[detector]
        )
    return found, metrics


def _recorded(detectors: Sequence[Detector], model: Model) -> tuple[Detector, ...]:
    """What is kept of each input for reports: confidence and, if it has them, GradNorm's factors.

    One whose name another detector has is left out.
    """
    wanted = [msp(), feature_norm(), residual_norm()] if model.head is not None else [msp()]
    taken = {d.name: d for d in detectors}
    return tuple(d for d in wanted if taken.get(d.name, d) == d)


def _make_schedule(
    batch_size: int, devices: int, streams: Iterable[DataStream], process: tuple[int, int]
) -> BatchSchedule:
    """Batches no larger than the largest data set, and a multiple of the number of devices."""
    lengths = [stream.length for stream in streams]
    longest = max((n for n in lengths if n is not None), default=batch_size)
    if None not in lengths:
        batch_size = min(batch_size, max(longest, 1))
    batch_size = -(-batch_size // devices) * devices
    return BatchSchedule(batch_size, max(1, PART_SIZE // batch_size), *process)


def _check_names(data: Mapping[str, Any]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"ood_data must be {{name: data}}, got a {type(data).__name__}")
    if not data:
        raise ValueError("no OOD set is given; give at least one, as {name: data}")
    seen = {FIT, ID.lower()}
    for name in data:
        if (
            not isinstance(name, str)
            or not name.replace("_", "").replace("-", "").replace(".", "").isalnum()
        ):
            raise ValueError(
                f"OOD set name {name!r} cannot be that of a file; use letters, digits, . _ and -"
            )
        if len(name) > 100:
            raise ValueError(f"OOD set name {name[:20]!r}... is too long; use at most 100 letters")
        if name.lower() in seen:
            raise ValueError(f"OOD set name {name!r} is taken; give each set a name of its own")
        seen.add(name.lower())


def _check_options(
    batch_size: int,
    max_undecodable: float,
    process: tuple[int, int],
    wait_seconds: float,
    out: Any,
    cache: str | None,
) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= max_undecodable <= 1:
        raise ValueError(f"max_undecodable is a fraction from 0 to 1, got {max_undecodable}")
    if not 0 <= process[0] < process[1]:
        raise ValueError(
            f"process must be (i, n) with 0 <= i < n, got {process}: number processes from 0"
        )
    if not wait_seconds >= 0:
        raise ValueError(f"wait_seconds must be at least 0, got {wait_seconds}")
    if out is None and (process[1] > 1 or cache):
        what = "several processes" if process[1] > 1 else "a cache"
        raise ValueError(f"{what} cannot share results kept in memory: give a folder (out)")


@contextlib.contextmanager
def _held(folder: Folder, config: Mapping[str, Any]) -> Any:
    """Claims the folder, and gives it up if nothing has come of it."""
    claim_folder(folder, dict(config))
    try:
        yield
    except Exception:
        # Leave nothing in the way of another try.
        if config["processes"] == 1 and folder.names() == [CONFIG]:
            folder.delete(CONFIG)
        raise
