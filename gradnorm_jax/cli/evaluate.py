"""The command that evaluates: names become objects, and `gradnorm_jax.evaluate` does the rest."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import Preprocess, get_preprocess
from gradnorm_jax.data.source import Source
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.evaluate import DEFAULT_DETECTORS, evaluate, evaluate_cache
from gradnorm_jax.evaluation.records import FIT, ID
from gradnorm_jax.evaluation.result import Result
from gradnorm_jax.models.named import load_named, needed_preprocess
from gradnorm_jax.progress import Track
from gradnorm_jax.types import Model

_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
"""In which variables those that start programs tell each process its number, and how many.

SLURM_NTASKS is not among them: a batch script that forgot `srun` sees it too, as process 0 alone.
"""

Repeated = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
"""An option that takes several values, and may be given several times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate detectors on an in-distribution set against out-of-distribution sets.

    Interrupted runs resume: run the same command again. With other data, weights, options or
    versions, or another number of processes, it is refused, because its files are to be those of an
    undisturbed run to the byte.

    Example: gradnorm-jax evaluate --model resnet50 --weights resnet50-0676ba61 --id imagenet/val
    --ood textures=dtd/images places=places --detectors gradnorm energy --out runs/resnet50

    Attributes:
        out: folder for the results: new, empty, or of the same run. A path or, as for gs://, a URL.
        model: a name that `gradnorm-jax models` lists; or `my_package.my_module:build`, a function
            that returns a Model, or a Model and its Preprocess, and may take the path of --weights.
        weights: of the model: anything that `gradnorm-jax convert` takes, names of published
            weights included.
        id: in-distribution test images: a folder, `csv:FILE` with columns file and label,
            `list:FILE@FOLDER` (OpenOOD's lists), `parquet:FILE`, or `tfds:NAME:SPLIT`.
        ood: one or more out-of-distribution sets, each as NAME=PATH, or `tfds:NAME`.
        fit: labelled in-distribution training images, for detectors that are fitted (mahalanobis).
        data_dir: where `tfds:` finds prepared data sets; by default where tfds puts them.
        preprocess: by default the model's own; bit480, bit32, crop224, imagenet224,
            `my_module:object`, or composed: `resize=256,crop=224,mean=imagenet,std=imagenet`.
        detectors: names, each with options in parentheses if need be, `gradnorm(ord=2)`, or your
            own, `my_module:my_detector(option=1)`.
        temperature: of gradnorm.
        dtype: of the network's activations; parameters and scores are float32 in any case.
        batch_size: of all devices; no result depends on it, up to rounding.
        workers: how many images each process decodes at once; by default as many as the CPUs that
            it may use.
        worker_processes: decode in processes in place of threads, for many cores and small images.
            They take seconds to start.
        max_undecodable: the largest fraction of a set's images that may be undecodable. They are
            listed and left out; more of them stop the run.
        cache: keep features and logits as well, in this precision; of the --fit images too, even if
            none of the detectors is fitted to them now.
        from_cache: the folder of an earlier run with --cache, whose features and logits take the
            place of network and images.
        process: `I/N`: this is process number I, from 0, of N that share the run through --out,
            each with devices of its own.
        distributed: ask what started it (srun, mpirun, the runtime of a TPU pod) which process
            this is.
        wait: how many seconds to wait for other processes between fitting and scoring.
        json: print the metrics as JSON, those of metrics.json, in place of a table.
    """

    out: str | Path
    model: str | None = None
    weights: Path | None = None
    id: str | None = None
    ood: Repeated = ()
    fit: str | None = None
    data_dir: str | Path | None = None
    preprocess: str | None = None
    detectors: Repeated = ()
    temperature: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 64
    workers: int | None = None
    worker_processes: bool = False
    max_undecodable: float = 0.01
    cache: Literal["float32", "bfloat16"] | None = None
    from_cache: str | Path | None = None
    process: str | None = None
    distributed: Literal["auto"] | None = None
    wait: float = 3600.0
    json: bool = False


def run_evaluate(
    options: EvaluateOptions,
    progress: bool | Track | None = None,
    should_stop: Callable[[], bool] = bool,
) -> Result:
    """Carries out `options`; see `gradnorm_jax.evaluate` for what is raised."""
    detectors = parse_detectors(
        _joined(options.detectors) or DEFAULT_DETECTORS,
        {"gradnorm": {"temperature": options.temperature}},
    )
    if options.from_cache is not None:
        given = [
            name
            for name in ("model", "weights", "id", "ood", "fit", "cache")
            if getattr(options, name)
        ]
        if given:
            raise ValueError(
                f"--from-cache takes the place of {', '.join(f'--{name}' for name in given)}: give "
                "only one of them"
            )
        return evaluate_cache(
            options.from_cache,
            detectors=detectors,
            out=options.out,
            progress=progress,
            should_stop=should_stop,
        )
    if options.model is None or options.id is None:
        raise ValueError("--model and --id must be given, or --from-cache")
    process = _find_process(options)
    sources = _open_sources(options)
    model, preprocess, label_offset = _load(options)
    decoding: dict[str, Any] = {
        "workers": options.workers,
        "worker_processes": options.worker_processes,
    }
    streams = {name: as_stream(source, preprocess, **decoding) for name, source in sources.items()}
    return evaluate(
        model,
        streams.pop(ID),
        streams,
        fit=streams.pop(FIT, None),
        detectors=detectors,
        preprocess=preprocess,
        out=options.out,
        name=f"{options.model}, {options.dtype}",
        cache=options.cache,
        batch_size=options.batch_size,
        label_offset=label_offset,
        max_undecodable=options.max_undecodable,
        process=process,
        wait_seconds=options.wait,
        progress=progress,
        should_stop=should_stop,
    )


def _joined(values: Iterable[tuple[str, ...]]) -> list[str]:
    return [value for group in values for value in group]


def _load(options: EvaluateOptions) -> tuple[Model, Preprocess, int]:
    """The model, its preprocessing, and the logit of class 0."""
    assert options.model is not None
    preprocess = get_preprocess(options.preprocess) if options.preprocess else None
    model, own, label_offset = load_named(options.model, options.weights, options.dtype)
    return model, preprocess or needed_preprocess(options.model, own), label_offset


def _open_sources(options: EvaluateOptions) -> dict[str, Source]:
    """The data sets that are given, in-distribution first; of those missing, all are named."""
    sources, missing = {}, []
    for name, spec in _name_data(options).items():
        try:
            sources[name] = open_source(spec, options.data_dir)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("; ".join(missing))
    return sources


def _name_data(options: EvaluateOptions) -> dict[str, str]:
    assert options.id is not None
    specs = {ID: options.id}
    for spec in _joined(options.ood):
        name, path = _parse_ood(spec)
        if name.lower() in {taken.lower() for taken in (FIT, *specs)}:
            raise ValueError(f"OOD set name {name!r} is taken; give each set a name of its own")
        specs[name] = path
    return specs | ({FIT: options.fit} if options.fit else {})


def _parse_ood(spec: str) -> tuple[str, str]:
    name, equals, path = spec.partition("=")
    if not equals and spec.startswith("tfds:"):
        # Such a set has a name already: tfds:NAME[/CONFIG][:SPLIT].
        return spec.removeprefix("tfds:").partition(":")[0].partition("/")[0], spec
    if not (name and equals and path):
        raise ValueError(f"cannot read OOD set {spec!r}; write NAME=PATH")
    return name, path


def _find_process(options: EvaluateOptions) -> tuple[int, int]:
    if options.distributed:
        if options.process:
            raise ValueError("--process and --distributed both say which process this is; give one")
        return _ask_launcher()
    if options.process is None:
        return 0, 1
    index, slash, count = options.process.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"--process must be I/N, with I from 0 to N - 1, such as 0/4, got {options.process!r}"
        )
    return int(index), int(count)


def _ask_launcher() -> tuple[int, int]:
    # Not jax.distributed.initialize: its service ends all processes when one of them dies.
    for index, count in _LAUNCHERS:
        if index in os.environ and count in os.environ:
            return int(os.environ[index]), int(os.environ[count])
    if jax.process_count() == 1:
        raise ValueError(
            "neither srun, nor mpirun, nor a TPU pod has started this: say which process this is "
            "with --process I/N"
        )
    return jax.process_index(), jax.process_count()
