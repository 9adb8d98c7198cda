"""What a run is made of, so that no other is mistaken for it."""

import collections
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gradnorm_jax.data.sources import Source
from gradnorm_jax.evaluation.folder import Folder, to_json

CONFIG = "config.json"
Manifest = dict[str, Any]
"""JSON: what decides the results of a run."""

_PACKAGES = ("gradnorm-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "tensorstore", "pyarrow")
_FREE = {
    f"options.{name}"
    for name in (
        "out",
        "data_dir",
        "devices_per_copy",
        "workers",
        "worker_processes",
        "max_bad",
        "distributed",
    )
}
"""What may change between two starts of a run."""


def environment() -> Manifest:
    """Versions, devices and processes, on which the last digits of scores depend."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "devices": collections.Counter(device.device_kind for device in jax.devices()),
        "processes": jax.process_count(),
    }


def describe_source(source: Source) -> Manifest:
    """The number of images of a source and its fingerprint."""
    return {"images": len(source), "sha256": source.fingerprint()}


def hash_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(folder: Folder) -> Manifest | None:
    """The description of the run that a folder holds; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    content = folder.read(CONFIG)
    try:
        return None if content is None else dict(json.loads(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.address}/{CONFIG} is not that of a run: {error}") from error


def claim(folder: Folder, manifest: Manifest) -> None:
    """Makes a folder that of the run described: writes its config, or checks the one there.

    Of several processes the first is to come first. Of runs that come at once, exactly one makes
    the folder its own.

    Raises:
        FileExistsError: the folder holds another run, or something else.
        FileNotFoundError: this is not the first process, and does not see what that has written.
        OSError: it cannot be read, listed or written.
    """
    there = read_config(folder)
    if there is None:
        _take(folder, manifest)
        claim(folder, manifest)
    elif unlike := differences(there, manifest):
        raise FileExistsError(
            f"{folder.address} holds another run: {unlike}; start it as it was to go on with it, "
            "or choose another --out"
        )
    elif not folder.names(CONFIG):
        # TensorStore takes a refusal to list files of Google Cloud Storage for an empty list.
        raise PermissionError(f"the files in {folder.address} cannot be listed; ask for permission")


def _take(folder: Folder, manifest: Manifest) -> None:
    if jax.process_index():
        raise FileNotFoundError(
            f"process {jax.process_index()} does not find in {folder.address} what process 0 has "
            "written; give a folder as --out that all processes share"
        )
    if set(folder.names()) - {CONFIG}:
        raise FileExistsError(
            f"{folder.address} already exists and is not empty; choose another --out"
        )
    # If another run is faster, its config is compared like any other.
    folder.create(CONFIG, to_json(manifest))


def differences(there: Manifest, now: Manifest) -> str:
    """What a description lacks or has otherwise of another, or of a part of one; "" if nothing."""
    old, new = (_flatten(json.loads(to_json(each))) for each in (there, now))
    unlike = [
        f"{key} is {old.get(key)!r} there and {value!r} now"
        for key, value in new.items()
        if key not in _FREE and old.get(key) != value
    ]
    return ", ".join(unlike[:3]) + (", ..." if len(unlike) > 3 else "")


def _flatten(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {".".join(path): value}
    return {k: v for key, below in value.items() for k, v in _flatten(below, (*path, key)).items()}
