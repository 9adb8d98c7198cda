"""A calibrated detector as one file, written and read.

Nothing is pickled, and no code is run that the file names unless the caller trusts it.
"""

import functools
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.calibration.calibrated import Calibrated
from gradnorm_jax.calibration.conformal import threshold_at_tpr
from gradnorm_jax.calibration.file_content import (
    SCORES,
    STATE,
    VERSION,
    WEIGHTS,
    decode_file,
    encode_file,
    take_below,
)
from gradnorm_jax.calibration.named_parts import (
    count_classes,
    find_preprocess,
    make_model,
    spec_of,
)
from gradnorm_jax.calibration.probe import check_probe, take_probe
from gradnorm_jax.calibration.state_layout import from_layout, to_layout
from gradnorm_jax.data.preprocess import Prepare
from gradnorm_jax.detectors import Batch, Detector, parse_detectors
from gradnorm_jax.detectors.parse import modules_named
from gradnorm_jax.evaluation.run_config import describe_preprocess, hash_model, versions
from gradnorm_jax.extras import needs_extra
from gradnorm_jax.fitted import Fitted
from gradnorm_jax.models.named import Dtype
from gradnorm_jax.references import is_reference
from gradnorm_jax.tree import leaves_by_name
from gradnorm_jax.types import Model, Outputs, linear_head
from gradnorm_jax.whole_files import written_whole


def save_detector(
    calibrated: Calibrated,
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    dtype: Dtype = "float32",
    with_weights: bool = False,
) -> None:
    """Writes a calibrated detector to a `.safetensors` file that `load_detector` reads.

    The file holds what the detector has learned, the calibration scores, the threshold, and what
    the model is known again by when it is loaded: a hash of its arrays and, if it takes images by a
    `Preprocess`, one of its program and the scores of two images. The arrays themselves are in it
    only `with_weights`.

    Args:
        calibrated: of `calibrate`.
        path: ends in `.safetensors`.
        model: what `load_detector` makes the model from unless it is given one: the name of a known
            network, or `module:function` as on the command line.
        weights: of that model: a path, or the name of published weights.
        dtype: of that model's activations.
        with_weights: keep the arrays of a known network in the file.

    Raises:
        ValueError: the path ends in something else, or the detector, its preprocessing or what it
            has learned cannot be written down.
        ModuleNotFoundError: the extra `data` is not installed.
    """
    fitted, path = calibrated.fitted, Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"detectors are written as .safetensors, got {path}; end the path in it")
    if with_weights and (model is None or is_reference(model)):
        raise ValueError("only the weights of a known network can be kept in the file: name it")
    _check_spec(fitted.detector)
    layout, state = to_layout(fitted.state)
    scores = np.asarray(calibrated.calibration_scores)
    arrays = {SCORES: scores} | {STATE + name: each for name, each in state.items()}
    if with_weights:
        named = leaves_by_name(jax.device_get(fitted.model))
        arrays |= {WEIGHTS + name: np.asarray(each) for name, each in named.items()}
    facts = {
        "version": VERSION,
        "detector": fitted.detector.name,
        "state": layout,
        "model": model,
        "model_sha256": hash_model(fitted.model),
        "weights": None if weights is None else os.fspath(weights),
        "dtype": dtype,
        "classes": count_classes(fitted.model, model) if with_weights else None,
        "label_offset": calibrated.label_offset,
        "preprocess": spec_of(calibrated.preprocess),
        "preprocess_facts": describe_preprocess(calibrated.preprocess),
        "threshold": float(calibrated.threshold),
        "tpr": float(calibrated.tpr),
        "confidence": float(calibrated.confidence),
        "confident": bool(calibrated.confident),
        "probe": take_probe(calibrated),
        "versions": versions(),
    }
    content = encode_file(facts, arrays)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def load_detector(
    path: str | os.PathLike[str],
    model: Model | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    preprocess: Prepare | str = None,
    trust: Collection[str] = (),
) -> Calibrated:
    """Reads what `save_detector` wrote.

    >>> calibrated = load_detector("detector.safetensors", model)
    >>> calibrated.is_ood(images)

    Args:
        path: the file.
        model: the classifier; by default the one that the file names is made.
        weights: where its weights are, if not where the file says.
        preprocess: what makes the network's input, where it has no name that the file could tell.
        trust: modules whose code may be run where the file names it, as the function that makes
            the model, or a detector of your own.

    Raises:
        FileNotFoundError: there is no such file, or there are no weights.
        ValueError: it is no such file, or a damaged one; the model's arrays or its function are
            others than those that the detector was calibrated with; or the file names code that is
            not trusted.
        ModuleNotFoundError: the extra `data` is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no detector file {path}")
    with needs_extra("data", "detector files"):
        import safetensors.numpy  # noqa: F401
    facts, arrays = decode_file(path)
    allow = functools.partial(_allow, trust=trust)
    try:
        return _load(facts, arrays, allow, model, weights, preprocess)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load(
    facts: Mapping[str, Any],
    arrays: dict[str, np.ndarray],
    allow: Callable[[str], None],
    model: Model | None,
    weights: str | os.PathLike[str] | None,
    preprocess: Prepare | str,
) -> Calibrated:
    for module in modules_named(facts["detector"]):
        allow(module)
    detector, *others = parse_detectors([facts["detector"]])
    if others:
        raise ValueError(f"{facts['detector']!r} is more than one detector")
    held = take_below(WEIGHTS, arrays)
    own: Prepare = None
    if model is None:
        model, own = make_model(facts, held, allow, weights)
    if hash_model(model) != facts["model_sha256"]:
        raise ValueError(
            "the model's arrays are others than those that the detector was calibrated with: give "
            "the same weights, or calibrate again"
        )
    prepare = find_preprocess(facts, own, preprocess, allow)
    state = from_layout(facts["state"], take_below(STATE, arrays), allow)
    scores = arrays.pop(SCORES)
    _check_scores(scores)
    fitted = Fitted(detector, model, state)
    _check_state(fitted, prepare)
    tpr, confidence, confident = facts["tpr"], facts["confidence"], facts["confident"]
    threshold = threshold_at_tpr(scores, tpr, confidence=confidence if confident else None)
    if float(threshold) != facts["threshold"]:
        raise ValueError(f"its threshold {facts['threshold']} is not that of its scores")
    calibrated = Calibrated(
        fitted,
        jnp.asarray(scores),
        threshold,
        tpr,
        confidence,
        confident,
        prepare,
        facts["label_offset"],
    )
    check_probe(calibrated, facts["probe"])
    return calibrated


def _check_spec(detector: Detector) -> None:
    # What a file can hold of a detector is its text.
    try:
        parsed = parse_detectors([detector.name])
    except ValueError:
        parsed = ()
    if parsed != (detector,):
        raise ValueError(
            f"the detector {detector.name!r} cannot be made again from its name: calibrate it by a "
            "text such as 'gradnorm(ord=2)', or 'my_module:my_detector(option=1)' for one of yours"
        )


def _check_scores(scores: np.ndarray) -> None:
    fit = scores.ndim == 1 and scores.size and np.issubdtype(scores.dtype, np.floating)
    if not (fit and np.isfinite(scores).all() and (np.diff(scores) >= 0).all()):
        raise ValueError("its calibration scores are not [n] finite numbers in ascending order")


def _check_state(fitted: Fitted, preprocess: Prepare) -> None:
    """Raises ValueError if the detector cannot score with what it is said to have learned."""
    detector, size = fitted.detector, getattr(preprocess, "size", None)
    if (detector.fit is None) != (fitted.state is None):
        raise ValueError(f"it does not hold what {detector.name} learns")

    def score(fitted: Fitted, batch: Any) -> jax.Array:
        if not isinstance(batch, Batch):
            return fitted.score(batch)
        return fitted.detector.score(fitted.state, fitted.model, batch)

    if size is not None:
        batch: Any = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    elif detector.needs != "network" and fitted.model.head is not None:
        kernel = jax.eval_shape(lambda model: linear_head(model).kernel, fitted.model)
        rows: Any = [jax.ShapeDtypeStruct((2, n), jnp.float32) for n in kernel.shape]
        batch = Batch(None, Outputs(*rows))
    else:
        return  # the shape of its inputs is not known
    try:
        shape = jax.eval_shape(score, fitted, batch).shape
    except Exception as error:  # of the detector, whatever it raises
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{detector.name} cannot score with what the file holds: {type(error).__name__}: "
            f"{reason}"
        ) from error
    if shape != (2,):
        raise ValueError(f"what it holds does not fit {detector.name}, which gives scores {shape}")


def _allow(module: str, *, trust: Collection[str]) -> None:
    if module not in trust:
        raise ValueError(
            f"it names code in the module {module!r}, which reading it would run; if you trust "
            f"that, say so: --trust {module}, or trust=[{module!r}]"
        )
