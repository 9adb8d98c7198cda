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
        name: that of the file, without its ending, or a shorter one.
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


_GOOGLE = "https://storage.googleapis.com"
_AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models"
_HUANG = "http://pages.cs.wisc.edu/~huangrui/finetuned_model"
_R232 = "resize=232,crop=224,mean=imagenet,std=imagenet"
_BIT_SIZES = ("R50x1", "R101x1", "R152x2", "R50x3", "R101x3", "R152x4")


def _torchvision(model: str, sha256: str, preprocess: str = "", file: str = "") -> Published:
    name = f"{file or model}-{sha256}"
    url = f"https://download.pytorch.org/models/{name}.pth"
    return Published(name, model, url, sha256, preprocess)


def _akamaster(depth: int, sha256: str) -> Published:
    name, model = f"resnet{depth}-{sha256}", f"resnet{depth}_cifar"
    return Published(name, model, f"{_AKAMASTER}/{name}.th", sha256, trained_on="CIFAR-10")


def _bit(name: str, trained_on: str) -> Published:
    model = "bit_" + re.sub("^BiT-[SM]-|-ILSVRC2012$", "", name).lower()
    return Published(name, model, f"{_GOOGLE}/bit_models/{name}.npz", trained_on=trained_on)


def _vit(name: str, model: str, file: str) -> Published:
    return Published(name, model, f"{_GOOGLE}/vit_models/{file}.npz", trained_on=_21K_1K)


def _augreg(size: str, recipe: str, rate: str) -> Published:
    file = f"{size}_16-i21k-300ep-lr_0.001-{recipe}-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_{rate}"
    model = f"vit_{size.lower()}16"
    return _vit(f"ViT-{size}_16-augreg", model, f"augreg/{file}-res_224")


_1K, _21K, _21K_1K = "ImageNet-1k", "ImageNet-21k", "ImageNet-21k, then 1k"
_ROWS = (
    *(_bit(f"BiT-S-{size}", _1K) for size in _BIT_SIZES),
    *(_bit(f"BiT-M-{size}", _21K) for size in _BIT_SIZES),
    *(_bit(f"BiT-M-{size}-ILSVRC2012", _21K_1K) for size in _BIT_SIZES),
    Published(
        "BiT-S-R101x1-flat-finetune",
        "bit_r101x1",
        f"{_HUANG}/BiT-S-R101x1-flat-finetune.pth.tar",
        trained_on="ImageNet-1k, labels in an order of their own",
    ),
    _torchvision("resnet18", "f37072fd"),
    _torchvision("resnet34", "b627a593"),
    _torchvision("resnet50", "0676ba61"),
    _torchvision("resnet50", "11ad3fa6", _R232),
    _torchvision("resnet101", "63fe2227"),
    _torchvision("wide_resnet50_2", "95faca4d"),
    _torchvision("densenet121", "a639ec97"),
    _torchvision("squeezenet1_1", "b8a52dc0"),
    _torchvision("mobilenet_v2_torch", "b0353104", file="mobilenet_v2"),
    _torchvision("mobilenet_v2_torch", "7ebf99e0", _R232, file="mobilenet_v2"),
    _vit("ViT-B_16-224", "vit_b16", "imagenet21k+imagenet2012/ViT-B_16-224"),
    _augreg("B", "aug_medium1-wd_0.1", "0.01"),
    _augreg("S", "aug_light1-wd_0.03", "0.03"),
    _augreg("Ti", "aug_none-wd_0.03", "0.03"),
    _akamaster(20, "12fca82f"),
    _akamaster(32, "d509ac18"),
    _akamaster(44, "014dd654"),
    _akamaster(56, "4bfd9763"),
    _akamaster(110, "1d1ed7c2"),
)
PUBLISHED: Mapping[str, Published] = {row.name: row for row in _ROWS}
"""Public weights by name."""
