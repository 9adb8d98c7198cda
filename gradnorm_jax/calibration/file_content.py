"""The bytes of a detector file: arrays in safetensors, everything else as JSON in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradnorm_jax.evaluation.run_config import hash_arrays
from gradnorm_jax.evaluation.storage import decode_arrays, encode_arrays
from gradnorm_jax.extras import needs_extra

HEADER = "gradnorm_jax.detector"
"""The entry of the header that tells everything."""
VERSION = 2

SCORES = "calibration_scores"
"""The name of the array that every file holds."""
STATE, WEIGHTS = "state/", "weights/"
"""How names begin: of what the detector has learned, and of the model's arrays."""

_FACTS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "detector": (str,),
    "state": (dict, list, str, type(None)),
    "model": (str, type(None)),
    "model_sha256": (str,),
    "weights": (str, type(None)),
    "dtype": (str,),
    "classes": (int, type(None)),
    "label_offset": (int,),
    "preprocess": (str, type(None)),
    "preprocess_facts": (dict, str, type(None)),
    "threshold": (float,),
    "tpr": (float,),
    "confidence": (float,),
    "confident": (bool,),
    "probe": (dict, type(None)),
    "versions": (dict,),
}
"""What the header tells, and of which types."""


def encode_file(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a file of these facts and arrays."""
    with needs_extra("data", "detector files"):
        import safetensors.numpy  # noqa: F401
    # In one entry, because safetensors does not keep the order of several.
    header = json.dumps({"sha256": _digest(facts, arrays), **facts}, allow_nan=False)
    return encode_arrays(arrays, {HEADER: header})


def _digest(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    return hash_arrays(dict(sorted(arrays.items())), json.dumps(facts, sort_keys=True))


def decode_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and the arrays of a file; ValueError unless it is whole and of this version."""
    content = path.read_bytes()
    try:
        arrays = decode_arrays(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        if HEADER not in metadata:
            raise ValueError("it holds no detector")
        facts = json.loads(metadata[HEADER])
        if facts.pop("sha256") != _digest(facts, arrays):
            raise ValueError("it is not what was written")
        if facts.get("version") != VERSION:
            raise ValueError(f"it is of version {facts.get('version')}, and this reads {VERSION}")
        _check_facts(facts)
        if SCORES not in arrays:
            raise ValueError("it holds no calibration scores")
    except Exception as error:  # of readers of damaged files, whatever they raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a whole detector file: {reason}") from error
    return facts, arrays


def _check_facts(facts: Mapping[str, Any]) -> None:
    if facts.keys() != _FACTS.keys():
        raise ValueError("its header tells other things than it should")
    for name, kinds in _FACTS.items():
        if type(facts[name]) not in kinds:
            raise ValueError(f"its {name} is a {type(facts[name]).__name__}")


def take_below(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start so, without that, taken out of all."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}
