"""A calibrated detector as a program of `jax.export`, which runs without this library."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import export

from gradnorm_jax import __version__
from gradnorm_jax.calibration.calibrated import Calibrated
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.sharding import batch_mesh

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "cuda", "tpu")
"""What a detector is exported for, unless it is said."""


def export_detector(
    calibrated: Calibrated, inputs: Any = None, *, platforms: Sequence[Platform] = PLATFORMS
) -> export.Exported:
    """Makes one program of a calibrated detector, its network and all their arrays.

    >>> exported = export_detector(calibrated)
    >>> pathlib.Path("detector.jaxexport").write_bytes(exported.serialize())

    Whoever has JAX and flatbuffers can run it, without this library or the network's code:

    >>> detector = jax.export.deserialize(pathlib.Path("detector.jaxexport").read_bytes())
    >>> score, p_value, is_ood, prediction = detector.call(images)

    It takes batches of any size, none included, and gives the fields of `Decision` as a tuple. Its
    `fun_name` tells what it is and by which versions it was made. JAX runs a program for six months
    after the release that it was exported by, and for three weeks before.

    Args:
        calibrated: of `calibrate` or `load_detector`.
        inputs: an array, or `jax.ShapeDtypeStruct`, like the inputs `[B, ...]` that it is called
            with, whatever B is. By default uint8 pixels `[B, H, W, 3]` of the size that the
            detector's `Preprocess` makes; scaling them is part of the program, resizing is not.
            Floats are the network's input, as `Calibrated.decide` takes them.
        platforms: what it can run on, none of which need be here.

    Raises:
        ValueError: the shape of the inputs is not known, there is no such platform, or JAX cannot
            export the model or the detector, as where they call back into Python.
    """
    if not platforms or not {*platforms} <= {*get_args(Platform)}:
        raise ValueError(f"platforms must be of {', '.join(get_args(Platform))}, got {platforms}")
    shape, dtype = _shape_and_type(calibrated, inputs)
    arrays = jax.device_get(calibrated)

    # A symbol is at least 1, and a batch may be empty; inside it has a row all the same, without
    # which there is no indexing.
    count, rows = export.symbolic_shape("b - 1, max(b - 1, 1)")

    def decide(images: jax.Array) -> tuple[jax.Array, ...]:
        # Behind the barrier the compiler does not compute in advance what follows from them, which
        # takes it four times as long for a bank of features.
        known = jax.lax.optimization_barrier(arrays)
        padding = [(0, rows - count, 0), *((0, 0, 0) for _ in shape)]
        padded = jax.lax.pad(images, jnp.zeros((), images.dtype), padding)
        # Image by image, so that no function of a user or of ours meets a size without a value.
        decisions = jax.vmap(lambda image: known.decide(image[None]))(padded)
        return tuple(x[:count, 0] for x in decisions)

    decide.__name__ = _describe(calibrated)
    try:
        # For one device, however many are here.
        with jax.set_mesh(batch_mesh(jax.local_devices()[:1])):
            program = export.export(jax.jit(decide), platforms=platforms)
            return program(jax.ShapeDtypeStruct((count, *shape), dtype))
    except Exception as error:  # of the model and the detector, whatever they raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{calibrated.fitted.detector.name} cannot be exported with this model: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _shape_and_type(calibrated: Calibrated, inputs: Any) -> tuple[tuple[int, ...], Any]:
    """The shape of one input, and its type."""
    preprocess = calibrated.preprocess
    if inputs is not None:
        return inputs.shape[1:], jax.dtypes.canonicalize_dtype(inputs.dtype)
    if isinstance(preprocess, Preprocess):
        return (preprocess.size, preprocess.size, 3), "uint8"
    raise ValueError(
        "the detector has no Preprocess that would tell the shape of its inputs: give inputs, an "
        "array or jax.ShapeDtypeStruct [B, ...] like them"
    )


def _describe(calibrated: Calibrated) -> str:
    """What `fun_name` tells, the only text that a serialised program has room for."""
    preprocess = calibrated.preprocess
    of = f" of {preprocess.name} images" if isinstance(preprocess, Preprocess) else ""
    return (
        f"{calibrated.fitted.detector.name}{of}, by gradnorm-jax {__version__}, "
        f"jax {jax.__version__}, jaxlib {version('jaxlib')}"
    )
