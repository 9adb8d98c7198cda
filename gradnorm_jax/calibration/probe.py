"""What tells whether a model and a detector compute what they did when they were calibrated.

Equal arrays do not say so: the function may be another. It is known again by its program, or else,
as by another version of JAX, by what it makes of images that are always the same.
"""

import re
from typing import Any

import jax
import numpy as np

from gradnorm_jax.calibration.calibrated import Calibrated
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.evaluation.run_config import hash_arrays

Probe = dict[str, Any]
"""JSON: the hash of the `program`, and the `scores` of the images."""

_RELATIVE, _OF_SPREAD = 0.02, 0.05
"""How far scores may move with the device and the version of JAX; more moves decisions."""


def take_probe(calibrated: Calibrated) -> Probe | None:
    """None if the detector takes no images of a known size, or gives scores that are not finite."""
    images = _images(calibrated)
    if images is None:
        return None
    scores = np.asarray(_score(calibrated, images), np.float64)
    if not np.isfinite(scores).all():
        return None
    return {"program": _hash_program(calibrated, images), "scores": scores.tolist()}


def check_probe(calibrated: Calibrated, probe: Probe | None) -> None:
    """Raises ValueError if the scores are not, up to rounding, what they were."""
    images = _images(calibrated)
    if probe is None or images is None:
        return
    match probe:
        case {"program": str(program), "scores": [float(), float()] as before}:
            pass
        case _:
            raise ValueError("what it tells of images that it was tried on is not whole")
    if _hash_program(calibrated, images) == program:
        return
    now = np.asarray(_score(calibrated, images), np.float64)
    allowed = _OF_SPREAD * float(np.std(calibrated.calibration_scores))
    if not np.allclose(now, before, rtol=_RELATIVE, atol=allowed):
        raise ValueError(
            f"the model's arrays are those that the detector was calibrated with, and its function "
            f"is another: two images are scored {now.tolist()} that were scored {before}; give the "
            "same function, or calibrate again"
        )


_score = jax.jit(Calibrated.score)


def _images(calibrated: Calibrated) -> np.ndarray | None:
    if not isinstance(calibrated.preprocess, Preprocess):
        return None
    size = calibrated.preprocess.size
    return np.random.default_rng(0).integers(256, size=(2, size, size, 3), dtype=np.uint8)


def _hash_program(calibrated: Calibrated, images: np.ndarray) -> str:
    program = jax.make_jaxpr(Calibrated.score)(calibrated, images)
    constants = {str(i): np.asarray(each) for i, each in enumerate(program.consts)}
    return hash_arrays(constants, re.sub("0x[0-9a-f]+", "", str(program)))  # without addresses
