"""From a decoded image to a network's input, one definition for each convention.

The spatial part runs on the host with Pillow and equals torchvision's transforms of Pillow images
bit for bit; the scaling of uint8 pixels to float32 runs on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.data.images import BadImage, to_rgb
from gradnorm_jax.extras import needs_extra
from gradnorm_jax.numerics import is_number
from gradnorm_jax.references import is_reference, load_reference

if TYPE_CHECKING:
    from PIL import Image

Channels = tuple[float, float, float]

_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
# At most 2 GiB while resizing. Only an image about 2000 times as long as wide goes beyond it.
_MOST_PIXELS = 2**27


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How images become a network's input; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        name: what it is called on the command line and in results.
        size: height and width in pixels of what `transform` makes.
        transform: maps any RGB image to one of `size` x `size` pixels. To be picklable for worker
            processes it must be a function of a module, or a `functools.partial` of one.
        mean: subtracted from each channel in [0, 1].
        std: what each channel is divided by after that.

    Raises:
        ValueError: the size is not a positive integer, `transform` no function, or `mean` or `std`
            are not three numbers.
    """

    name: str
    size: int
    transform: Callable[[Image.Image], Image.Image]
    mean: Channels
    std: Channels

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {self.size!r}")
        if not callable(self.transform):
            raise ValueError(f"transform must be a function of an image, got {self.transform!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            channels = tuple(value) if np.shape(value) == (3,) else ()
            if not channels or not all(is_number(x) and math.isfinite(x) for x in channels):
                raise ValueError(f"{name} must be a number for each of 3 channels, got {value!r}")
            object.__setattr__(self, name, channels)
        if not min(self.std) > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The uint8 pixels `[size, size, 3]` of an RGB image.

        Raises:
            BadImage: the image is so elongated that resizing it would not fit into memory.
            ValueError: the transform does not make what it should.
        """
        pixels = np.asarray(self.transform(image))
        if pixels.shape != (self.size, self.size, 3) or pixels.dtype != np.uint8:
            raise ValueError(
                f"the transform of {self.name} must make RGB images of {self.size} x {self.size} "
                f"pixels, got {pixels.dtype}{list(pixels.shape)}"
            )
        return pixels


Prepare = Preprocess | Callable[[jax.Array], jax.Array] | None
"""How data become a network's input: as images do, by a function of a batch, or not at all."""


def to_pixels(images: np.ndarray, preprocess: Prepare) -> np.ndarray:
    """The part of preparing `[N, ...]` that the host does: uint8 images through a `Preprocess`.

    Images of other types are taken to be the network's input already.

    Raises:
        ValueError: images are not `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, or they are of several
            sizes, without a `Preprocess`.
    """
    if images.dtype == object and len(images) and not isinstance(preprocess, Preprocess):
        raise ValueError(
            "inputs must have one shape: give a Preprocess for images of several sizes"
        )
    if not isinstance(preprocess, Preprocess) or images.dtype not in (np.uint8, object):
        return images
    shape = (len(images), preprocess.size, preprocess.size, 3)
    pixels = np.empty(shape, np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[...] = preprocess.pixels(_to_image(image))
    return pixels


def _to_image(pixels: np.ndarray) -> Image.Image:
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if not (grey.ndim == 2 or (grey.ndim == 3 and grey.shape[-1] == 3)) or grey.dtype != np.uint8:
        raise ValueError(
            "images for a Preprocess must be uint8 arrays [H, W], [H, W, 1] or [H, W, 3], got "
            f"{pixels.dtype}{list(pixels.shape)}"
        )
    with needs_extra("data", "images for a Preprocess"):
        from PIL import Image
    return to_rgb(Image.fromarray(grey))


def to_network_input(data: jax.Array, preprocess: Prepare) -> jax.Array:
    """The part of preparing `[B, ...]` that the device does."""
    if isinstance(preprocess, Preprocess):
        return scale(data, preprocess) if data.dtype == jnp.uint8 else data
    return data if preprocess is None else preprocess(data)


def scale(pixels: jax.Array, preprocess: Preprocess) -> jax.Array:
    r"""Scales pixels to a network's input: torchvision's `ToTensor`, then its `Normalize`.

    .. math:: y = (x / 255 - mean) / std

    Args:
        pixels: `[B, H, W, 3]` uint8.
        preprocess: gives the mean and the standard deviation of the channels.

    Returns:
        `[B, H, W, 3]` float32. XLA multiplies by reciprocals instead of dividing, which moves some
        values by a unit or two in the last place of 1 / std.
    """
    mean = jnp.asarray(preprocess.mean, jnp.float32).reshape(1, 1, 1, 3)
    std = jnp.asarray(preprocess.std, jnp.float32).reshape(1, 1, 1, 3)
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def resize(image: Image.Image, size: int) -> Image.Image:
    """The whole image at `size` x `size` pixels, bilinear with antialiasing, no crop."""
    return image.resize((size, size), _BILINEAR)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side `size` pixels and its longer one to scale, rounded down.

    Raises:
        BadImage: the longer side would be so long that the result would not fit into memory.
    """
    short, long = sorted(image.size)
    new_long = int(size * long / short)
    if size * new_long > _MOST_PIXELS:
        raise BadImage(
            f"the image of {image.width} x {image.height} pixels is too elongated to be resized to "
            f"{size} pixels on its shorter side"
        )
    wide = image.width > image.height
    new_size = (new_long, size) if wide else (size, new_long)
    return image.resize(new_size, _BILINEAR)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels, with zeros around an image that is smaller."""
    left, top = (_crop_start(length, size) for length in image.size)
    # Pillow fills with zeros what lies outside the image.
    return image.crop((left, top, left + size, top + size))


def _crop_start(length: int, size: int) -> int:
    # torchvision rounds halves to even when cropping, but down when padding.
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def _imagenet224(image: Image.Image) -> Image.Image:
    return centre_crop(resize_short_side(image, 256), 224)


_HALF: Channels = (0.5, 0.5, 0.5)

PREPROCESSES = {
    preprocess.name: preprocess
    for preprocess in (
        Preprocess("bit480", 480, functools.partial(resize, size=480), _HALF, _HALF),
        Preprocess("bit32", 32, functools.partial(resize, size=32), _HALF, _HALF),
        Preprocess("crop224", 224, functools.partial(centre_crop, size=224), _HALF, _HALF),
        Preprocess("imagenet224", 224, _imagenet224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
}
"""All preprocessings by name.

`bit480` is that of the paper: the whole image at 480 x 480, in [-1, 1]; `bit32` is the same at
32 x 32. `crop224` takes the centre as it is, in [-1, 1]. `imagenet224` is torchvision's: shorter
side 256, centre 224, ImageNet's mean and standard deviation.
"""


_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "half": (_HALF, _HALF),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_COMPOSED = "resize=256,crop=224,mean=imagenet,std=imagenet"


def get_preprocess(spec: str) -> Preprocess:
    """A preprocessing by the way users name one.

    Args:
        spec: a key of `PREPROCESSES`; `module:object`, a `Preprocess` of your own; or composed, as
            in `resize=256,crop=224,mean=imagenet,std=imagenet`. `resize=256` makes the shorter side
            256 pixels, `squash=32` the whole image 32 x 32, `crop=224` takes the centre. `mean` and
            `std` are imagenet, cifar10, cifar100, half (0.5), none, or three numbers joined by `/`.

    Raises:
        ValueError: it is none of these.
    """
    if spec in PREPROCESSES:
        return PREPROCESSES[spec]
    if "=" in spec:
        return _compose(spec)
    if is_reference(spec):
        found = load_reference(spec)
        if not isinstance(found, Preprocess):
            raise ValueError(f"{spec} must be a Preprocess, got {type(found).__name__}")
        return found
    raise ValueError(
        f"unknown preprocessing {spec!r}: choose from {', '.join(PREPROCESSES)}, or write "
        f"module:object, or {_COMPOSED}"
    )


def _compose(spec: str) -> Preprocess:
    steps: dict[str, int] = {}
    statistics: dict[str, Channels] = {}
    for part in spec.split(","):
        key, _, value = (text.strip() for text in part.partition("="))
        if key in steps or key in statistics:
            raise ValueError(f"{key} is given twice in the preprocessing {spec!r}")
        if key in _STEPS and value.isdecimal() and int(value) > 0:
            steps[key] = int(value)
        elif key in ("mean", "std"):
            statistics[key] = _channels(key, value, spec)
        else:
            raise ValueError(
                f"cannot read {part.strip()!r} in the preprocessing {spec!r}: write it as in "
                f"{_COMPOSED}, or with squash=SIZE"
            )
    if "crop" not in steps and list(steps) != ["squash"]:
        raise ValueError(f"the preprocessing {spec!r} must end with crop=SIZE or squash=SIZE")
    if statistics.keys() != {"mean", "std"}:
        raise ValueError(f"the preprocessing {spec!r} must give both mean and std")
    return Preprocess(spec, [*steps.values()][-1], _Steps(tuple(steps.items())), **statistics)


def _channels(key: str, value: str, spec: str) -> Channels:
    if value in _STATISTICS:
        return _STATISTICS[value][key == "std"]
    try:
        first, second, third = map(float, value.split("/"))
    except ValueError as error:
        raise ValueError(
            f"{key} must be one of {', '.join(_STATISTICS)} or three numbers joined by '/', got "
            f"{value!r} in {spec!r}"
        ) from error
    return first, second, third


_STEPS: dict[str, Any] = {"resize": resize_short_side, "squash": resize, "crop": centre_crop}


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Steps one after the other; equal where they are, so that equal texts compile once."""

    steps: tuple[tuple[str, int], ...]

    def __call__(self, image: Image.Image) -> Image.Image:
        for name, size in self.steps:
            image = _STEPS[name](image, size)
        return image
