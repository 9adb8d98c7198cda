"""What a run is made of, so that no other is mistaken for it."""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradnorm_jax.data.preprocess import Prepare, Preprocess
from gradnorm_jax.data.stream import DataStream
from gradnorm_jax.detectors import Detector, NetworkPass, Reading, Rectifier
from gradnorm_jax.evaluation.storage import Folder, to_json
from gradnorm_jax.tree import leaves_by_name
from gradnorm_jax.types import Model

CONFIG = "config.json"
RunConfig = dict[str, Any]
"""JSON: what decides the results of a run."""

_PACKAGES = ("gradnorm-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "pyarrow", "safetensors")
_LISTED = 3
_Part = Detector | Rectifier | Reading | NetworkPass


def describe_run(
    model: Model,
    streams: Mapping[str, DataStream],
    detectors: Sequence[Detector],
    preprocess: Prepare,
    facts: Mapping[str, Any],
) -> RunConfig:
    """All that decides the results of an evaluation.

    A model given as an object is known by the content of its arrays, a function by its name.

    Args:
        model: the classifier.
        streams: the data sets by name.
        detectors: those asked for.
        preprocess: what makes the network's input.
        facts: further entries, JSON.
    """
    return {
        "weights_sha256": hash_model(model),
        "data": {name: stream.identity() for name, stream in streams.items()},
        "detectors": {d.name: _describe_detector(d) for d in detectors},
        "preprocess": describe_preprocess(preprocess),
        **facts,
        "versions": versions(),
        "devices": collections.Counter(device.device_kind for device in jax.local_devices()),
    }


def _describe_detector(detector: _Part) -> dict[str, Any]:
    fields = {Rectifier: "rectify", Reading: "read_fn", NetworkPass: "function"}
    function = getattr(detector, fields.get(type(detector), "score_fn"))
    options = {
        name: _describe_detector(value) if isinstance(value, _Part) else repr(value)
        for name, value in dict(detector.options).items()
    }
    return {"score": _name(function), "options": options}


def describe_preprocess(preprocess: Prepare) -> dict[str, Any] | str | None:
    """What tells a preprocessing from others, JSON; a function by its name."""
    if not isinstance(preprocess, Preprocess):
        return _name(preprocess)
    names = ("name", "size", "mean", "std")
    return {name: getattr(preprocess, name) for name in names}


def _name(function: Any) -> str | None:
    if function is None:
        return None
    module = getattr(function, "__module__", "")
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def hash_model(model: Model) -> str:
    """The SHA-256, in hexadecimal digits, of a model's arrays and of where its last layer is."""
    return hash_arrays(leaves_by_name(model), repr(model.head))


def hash_arrays(arrays: Mapping[str, Any], text: str) -> str:
    """The SHA-256, in hexadecimal digits, of a text and of arrays with their names."""
    digest = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        array = np.asarray(array)
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Those of Python and of the packages that results depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def read_config(folder: Folder) -> RunConfig | None:
    """The description of the run that a folder holds; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    content = folder.read(CONFIG)
    if content is None:
        return None
    try:
        config = json.loads(content)
        if not (isinstance(config, dict) and isinstance(config.get("versions"), dict)):
            raise ValueError("it describes no run")
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{folder.address}/{CONFIG} is not that of a run: {error}") from error
    return config


def claim_folder(folder: Folder, config: RunConfig) -> None:
    """Makes a folder that of the run described: writes its config, or compares the one there.

    Of runs that come at once, exactly one makes the folder its own; equal runs share it, and write
    equal files.

    Raises:
        FileExistsError: the folder holds another run, or something else.
        OSError: it cannot be read, listed or written.
    """
    stored = read_config(folder)
    if stored is None:
        if set(folder.names()) - {CONFIG}:
            raise FileExistsError(
                f"{folder.address} already exists and is not empty; choose another --out"
            )
        # If another run is faster, its config is compared like any other.
        folder.create(CONFIG, to_json(config))
        stored = read_config(folder)
    if stored is None or (differing := find_differences(stored, config)):
        raise FileExistsError(
            f"{folder.address} holds another run: {differing}; run its own command again to resume "
            "it, or choose another --out"
        )
    if not folder.names(CONFIG):
        # TensorStore takes a refusal to list files of Google Cloud Storage for an empty list.
        raise PermissionError(f"the files in {folder.address} cannot be listed; ask for permission")


@contextlib.contextmanager
def claimed(folder: Folder, config: RunConfig) -> Iterator[None]:
    """Claims a folder, and gives it up if its body raises before anything is written."""
    claim_folder(folder, config)
    try:
        yield
    except Exception:
        # Leave nothing in the way of another try.
        if config["processes"] == 1 and folder.names() == [CONFIG]:
            folder.delete(CONFIG)
        raise


def find_differences(stored: RunConfig, config: RunConfig) -> str:
    """What a stored description has otherwise than `config`, or lacks; "" if nothing."""
    old, new = (flatten(json.loads(to_json(each))) for each in (stored, config))
    differing = [
        _difference(key, old.get(key), value) for key, value in new.items() if old.get(key) != value
    ]
    differing += [f"{key} is {old[key]!r} there and missing now" for key in old if key not in new]
    return ", ".join(differing[:_LISTED]) + (", ..." if len(differing) > _LISTED else "")


def _difference(key: str, stored: Any, now: Any) -> str:
    match key.split("."):
        case ["data", *name, "sha256"]:
            return (
                f"the data of {'.'.join(name)} are others (content, or names, labels, sizes or "
                "modification times of files)"
            )
    return f"{key} is {stored!r} there and {now!r} now"


def flatten(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of nested mappings by their keys, joined by dots."""
    if not isinstance(value, Mapping) or not value:
        return {".".join(path): value}
    return {k: v for key, below in value.items() for k, v in flatten(below, (*path, key)).items()}
