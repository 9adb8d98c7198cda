"""The command that makes a detector file."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from gradnorm_jax.calibration.calibrated import Calibrated, calibrate
from gradnorm_jax.calibration.detector_file import save_detector
from gradnorm_jax.data import as_stream
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.models.named import Dtype, load_named, needed_preprocess
from gradnorm_jax.text import to_utf8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Calibrate a detector on held-out in-distribution images, and write it to a file.

    `gradnorm-jax score` decides with it for one image at a time, and `gradnorm-jax watch` for a
    stream of them.

    Example: gradnorm-jax calibrate --model mobilenet_v2 --weights mobilenet_v2.npz
    --id held_out_images --out gradnorm.safetensors

    Attributes:
        out: the file to be written, which ends in .safetensors.
        model: a name that `gradnorm-jax models` lists; or `my_package.my_module:build`, as for
            `gradnorm-jax evaluate`.
        weights: of the model: anything that `gradnorm-jax convert` takes, names of published
            weights included.
        id: in-distribution images that neither the network nor the detector is trained on: a
            folder, `csv:FILE`, `list:FILE@FOLDER`, `parquet:FILE`, or `tfds:NAME:SPLIT`.
        detector: a name, with options in parentheses if need be, `gradnorm(ord=2)`, or your own,
            `my_module:my_detector(option=1)`.
        fit: labelled in-distribution training images, for detectors that are fitted (mahalanobis).
        tpr: the fraction of new in-distribution images that shall be recognised as such.
        confidence: of the interval of the true positive rate.
        confident: choose the threshold such that the true positive rate is at least --tpr with this
            confidence, rather than on average over calibration sets.
        with_weights: keep the weights of a known network in the file.
        data_dir: where `tfds:` finds prepared data sets; by default where tfds puts them.
        preprocess: by default the model's own; otherwise as for `gradnorm-jax evaluate`.
        dtype: of the network's activations.
        batch_size: of all devices; no result depends on it, up to rounding.
        workers: how many images to decode at once; by default as many as there are CPUs.
        max_undecodable: the largest fraction of images that may be undecodable.
        json: print JSON in place of a sentence.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    model: str
    weights: Path | None = None
    id: str
    detector: str = "gradnorm"
    fit: str | None = None
    tpr: float = 0.95
    confidence: float = 0.95
    confident: bool = False
    with_weights: bool = False
    data_dir: str | Path | None = None
    preprocess: str | None = None
    dtype: Dtype = "float32"
    batch_size: int = 64
    workers: int | None = None
    max_undecodable: float = 0.01
    json: bool = False


def run_calibrate(options: CalibrateOptions) -> str:
    """Calibrates, writes the file, and says what was found."""
    preprocess = get_preprocess(options.preprocess) if options.preprocess else None
    sources = {
        name: open_source(spec, options.data_dir)
        for name, spec in {"id": options.id, "fit": options.fit}.items()
        if spec is not None
    }
    model, own, label_offset = load_named(options.model, options.weights, options.dtype)
    preprocess = preprocess or needed_preprocess(options.model, own)
    streams: dict[str, Any] = {
        name: as_stream(source, preprocess, workers=options.workers)
        for name, source in sources.items()
    }
    calibrated = calibrate(
        options.detector,
        model,
        streams["id"],
        fit=streams.get("fit"),
        tpr=options.tpr,
        confidence=options.confidence,
        confident=options.confident,
        preprocess=preprocess,
        label_offset=label_offset,
        batch_size=options.batch_size,
        max_undecodable=options.max_undecodable,
    )
    save_detector(
        calibrated,
        options.out,
        model=options.model,
        weights=options.weights,
        dtype=options.dtype,
        with_weights=options.with_weights,
    )
    if options.json:
        return json.dumps(_to_dict(calibrated, options.out), indent=2)
    return f"{_describe(calibrated)}\ncalibrated: {options.out}"


def _to_dict(calibrated: Calibrated, out: Path) -> dict[str, Any]:
    interval = calibrated.tpr_interval
    return {
        "file": to_utf8(str(out)),
        "detector": calibrated.fitted.detector.name,
        "images": calibrated.calibration_scores.size,
        "threshold": float(f"{float(calibrated.threshold):.9g}"),
        "tpr": calibrated.tpr,
        "confidence": calibrated.confidence,
        "confident": calibrated.confident,
        "tpr_interval": [interval.low, interval.high],
    }


def _describe(calibrated: Calibrated) -> str:
    count, interval = calibrated.calibration_scores.size, calibrated.tpr_interval
    confidence = f"{calibrated.confidence:.10g}"
    promise = f"with confidence {confidence}" if calibrated.confident else "on average"
    return (
        f"{calibrated.fitted.detector.name} on {count} images: in-distribution from a score of "
        f"{float(calibrated.threshold):.6g} on, for a true positive rate of at least "
        f"{calibrated.tpr:.10g} {promise}; it is within {interval.low:.2%} to {interval.high:.2%} "
        f"with confidence {confidence}"
    )
