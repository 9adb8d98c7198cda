"""The command that makes a calibrated detector run without this library."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from gradnorm_jax.calibration.export import PLATFORMS, Platform, export_detector
from gradnorm_jax.cli.opening import Opened
from gradnorm_jax.extras import needs_extra
from gradnorm_jax.whole_files import written_whole


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Make a file of `gradnorm-jax calibrate` one program that runs wherever JAX does.

    The network and its weights are in it, and nothing else is needed but jax and flatbuffers:

        detector = jax.export.deserialize(pathlib.Path("detector.jaxexport").read_bytes())
        score, p_value, is_ood, prediction = detector.call(images)

    Example: gradnorm-jax export gradnorm.safetensors -o detector.jaxexport

    Attributes:
        detector: the file of `gradnorm-jax calibrate`.
        opening: how the file is read.
        out: the file to be written.
        dtype: uint8, and the images are pixels as the detector's preprocessing makes them by
            resizing and cropping; float32, and they are the network's input.
        platforms: what it can run on.
    """

    detector: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DETECTOR_FILE")]
    opening: Opened
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    dtype: Literal["uint8", "float32"] = "uint8"
    platforms: tuple[Platform, ...] = PLATFORMS


def run_export(options: ExportOptions) -> str:
    """Exports, writes the file, and says what it is."""
    with needs_extra("data", "exported detectors"):
        import flatbuffers  # noqa: F401
    calibrated = options.opening.load(options.detector)
    size = getattr(calibrated.preprocess, "size", None)
    if size is None:
        raise ValueError(
            f"{options.detector} has no Preprocess that would tell the shape of its inputs: export "
            "it in Python, gradnorm_jax.export_detector(calibrated, inputs)"
        )
    inputs = jax.ShapeDtypeStruct((1, size, size, 3), options.dtype)
    exported = export_detector(calibrated, inputs, platforms=options.platforms)
    content = exported.serialize()
    with written_whole(options.out) as path:
        path.write_bytes(content)
    return (
        f"{exported.fun_name}: {options.dtype} [B, {size}, {size}, 3] on "
        f"{', '.join(exported.platforms)}, {len(content) / 1e3:,.0f} kB\nexported: {options.out}"
    )
