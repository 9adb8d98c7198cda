"""Weights that are published, by name: where they are, and whose network they belong to."""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from gradnorm_jax.progress import Track
from gradnorm_jax.weights.download import fetch


@dataclasses.dataclass(frozen=True)
class Published:
    """A public weights file.

    Attributes:
        name: of the file, without its ending.
        model: the name of its network.
        url: where it is.
        sha256: what its hash begins with; empty if that is not known.
        preprocess: what its images need; empty for what all of the network's do.
        trained_on: the data, and what tells it from other weights of the same network.
    """

    name: str
    model: str
    url: str
    sha256: str = ""
    preprocess: str = ""
    trained_on: str = "ImageNet-1k"


def download(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | Track | None = None,
) -> Path:
    """The path of published weights, which are downloaded unless they are there already.

    Args:
        name: a key of `PUBLISHED`.
        folder: where they are kept; by default `weights` in `cache_folder()`.
        progress: see `gradnorm_jax.progress.show_progress`.

    Raises:
        OSError: they cannot be downloaded; the message says where to put them by hand.
        ValueError: no weights go by this name, or the file is not the one that is recorded.
    """
    published = get_published(name)
    folder = Path(folder) if folder is not None else cache_folder() / "weights"
    path = folder / PurePosixPath(published.url).name
    return fetch(published.url, path, sha256=published.sha256, progress=progress)


def cache_folder() -> Path:
    """Where downloads are kept: `$GRADNORM_JAX_CACHE`, or `gradnorm_jax` in the user's cache."""
    if own := os.environ.get("GRADNORM_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gradnorm_jax")


def get_published(name: str) -> Published:
    """The row of `PUBLISHED` called `name`; ValueError that tells how to find one if none is."""
    if name not in PUBLISHED:
        close = difflib.get_close_matches(name, PUBLISHED, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"no file and no published weights are called {name!r}; {hint}`gradnorm-jax models` "
            "lists the latter"
        )
    return PUBLISHED[name]


def _torchvision(model: str, sha256: str, preprocess: str = "") -> Published:
    name = f"{model}-{sha256}"
    url = f"https://download.pytorch.org/models/{name}.pth"
    return Published(name, model, url, sha256, preprocess)


def _bit(name: str, trained_on: str) -> Published:
    model = "bit_" + re.sub("^BiT-[SM]-|-ILSVRC2012$", "", name).lower()
    url = f"https://storage.googleapis.com/bit_models/{name}.npz"
    return Published(name, model, url, trained_on=trained_on)


_R232 = "resize=232,crop=224,mean=imagenet,std=imagenet"
_BIT_SIZES = ("R50x1", "R101x1", "R152x2", "R50x3", "R101x3", "R152x4")
_ROWS = (
    *(_bit(f"BiT-S-{size}", "ImageNet-1k") for size in _BIT_SIZES),
    *(_bit(f"BiT-M-{size}", "ImageNet-21k") for size in _BIT_SIZES),
    *(_bit(f"BiT-M-{size}-ILSVRC2012", "ImageNet-21k, -1k") for size in _BIT_SIZES),
    _torchvision("resnet18", "f37072fd"),
    _torchvision("resnet34", "b627a593"),
    _torchvision("resnet50", "0676ba61"),
    _torchvision("resnet50", "11ad3fa6", _R232),
    _torchvision("resnet101", "63fe2227"),
    _torchvision("wide_resnet50_2", "95faca4d"),
)
PUBLISHED: Mapping[str, Published] = {row.name: row for row in _ROWS}
"""Public weights by name."""
