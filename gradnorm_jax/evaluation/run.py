"""A run from names and paths to a folder of results; all files are read and written here."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import Any

import jax
import pyarrow
import pyarrow.parquet

from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.sources import Source, open_source
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.evaluate import ID, Evaluation, evaluate
from gradnorm_jax.evaluation.scoring import ScoreTable, Track, no_progress
from gradnorm_jax.models import get_architecture, load_model


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate detectors on an in-distribution set against out-of-distribution sets.

    Attributes:
        model: bit_r50x1, bit_r101x1, bit_r152x2, bit_r50x3, bit_r101x3, bit_r152x4, bit_tiny or
            mobilenet_v2.
        weights: the model's weights, a .npz or .safetensors file.
        id: in-distribution test images: a folder, or `csv:FILE` with columns file and label.
        ood: one or more out-of-distribution sets, each as NAME=PATH.
        out: folder for the results; must not exist or be empty.
        fit: labelled in-distribution training images, for detectors that are fitted (mahalanobis).
        preprocess: bit480, bit32, crop224 or imagenet224; by default the model's own.
        detectors: names, each with options in parentheses if need be: `gradnorm(ord=2)`.
        temperature: of gradnorm.
        batch_size: rounded up to a multiple of the number of devices; no result depends on it.
    """

    model: str
    weights: Path
    id: str
    ood: tuple[str, ...]
    out: Path
    fit: str | None = None
    preprocess: str | None = None
    detectors: tuple[str, ...] = ("msp", "odin", "mahalanobis", "energy", "gradnorm")
    temperature: float = 1.0
    batch_size: int = 64


def run(options: EvaluateOptions, track: Track[Any] = no_progress) -> Evaluation:
    """Runs an evaluation and writes config, scores, figures and report to `options.out`.

    Everything that can be wrong with the options is found before the first image is read.

    Raises:
        ValueError: an option is wrong.
        OSError: a file cannot be read or written.
    """
    architecture = get_architecture(options.model)
    preprocess = get_preprocess(options.preprocess or architecture.preprocess)
    detectors = parse_detectors(
        options.detectors, {"gradnorm": {"temperature": options.temperature}}
    )
    if options.batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {options.batch_size}")
    id_source = open_source(options.id)
    ood_sources = _open_ood(options.ood)
    fit_source = open_source(options.fit) if options.fit else None
    folder = new_folder(options.out)
    model = load_model(options.model, options.weights)
    evaluation = evaluate(
        model,
        preprocess=preprocess,
        id_source=id_source,
        ood_sources=ood_sources,
        detectors=detectors,
        fit_source=fit_source,
        batch_size=options.batch_size,
        label_offset=architecture.label_offset,
        track=track,
    )
    _write_json(folder / "config.json", describe_run(options, preprocess.name))
    write_results(folder, evaluation)
    return evaluation


def new_folder(path: Path) -> Path:
    """Makes the folder of a run; FileExistsError if there is something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists and is not empty; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path


def describe_run(options: EvaluateOptions, preprocess: str) -> dict[str, Any]:
    """What is needed to run it again: the options, the weights' hash, versions and devices."""
    packages = ("gradnorm-jax", "jax", "jaxlib", "flax", "numpy", "pillow")
    return {
        "options": {**dataclasses.asdict(options), "preprocess": preprocess},
        "weights_sha256": _sha256(options.weights),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "devices": [device.device_kind for device in jax.devices()],
    }


def write_results(folder: Path, evaluation: Evaluation) -> None:
    """Writes scores (Parquet), figures (JSON), the report (Markdown) and histograms (PNG)."""
    (folder / "scores").mkdir()
    for name, table in evaluation.tables.items():
        pyarrow.parquet.write_table(_to_arrow(table), folder / "scores" / f"{name}.parquet")
    _write_json(folder / "metrics.json", _figures(evaluation))
    (folder / "report.md").write_text(report.summary(evaluation), encoding="utf-8")
    try:
        report.plot_histograms(evaluation, folder / "histograms.png")
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning(
            "histograms.png is left out, for want of matplotlib: pip install 'gradnorm-jax[plots]'"
        )


def _open_ood(specs: tuple[str, ...]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not (name and equals and path):
            raise ValueError(f"cannot read OOD set {spec!r}; write NAME=PATH")
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ValueError(
                f"OOD set name {name!r} cannot be the name of a file; use letters, digits, . _ and -"
            )
        if name in sources or name.lower() == ID.lower():
            raise ValueError(f"OOD set name {name!r} is taken; give each set a name of its own")
        sources[name] = open_source(path)
    if not sources:
        raise ValueError("no OOD set is given; give at least one as NAME=PATH")
    return sources


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": evaluation.accuracy,
        "images": {name: len(table.ids) for name, table in evaluation.tables.items()},
        "excluded": {
            **{name: dict(table.excluded) for name, table in evaluation.tables.items()},
            "fit": dict(evaluation.fit_excluded),
        },
        "not_run": dict(evaluation.not_run),
        "metrics": {
            detector: {name: dataclasses.asdict(cell) for name, cell in cells.items()}
            for detector, cells in evaluation.metrics.items()
        },
        "averages": {
            detector: report.averages(cells.values())
            for detector, cells in evaluation.metrics.items()
        },
    }


def _to_arrow(table: ScoreTable) -> pyarrow.Table:
    columns = {"id": table.ids, "label": table.labels, "prediction": table.predictions}
    return pyarrow.table({**columns, **table.scores})


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, default=str, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
