"""From a decoded image to a network's input, one definition for each convention.

The spatial part runs on the host with Pillow and equals torchvision's transforms of Pillow images
bit for bit; the scaling of uint8 pixels to float32 runs on the device.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gradnorm_jax.data.images import BadImage

Channels = tuple[float, float, float]

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
    """

    name: str
    size: int
    transform: Callable[[Image.Image], Image.Image]
    mean: Channels
    std: Channels

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The uint8 pixels `[size, size, 3]` of an RGB image.

        Raises:
            BadImage: the image is so elongated that resizing it would not fit into memory.
        """
        return np.asarray(self.transform(image))


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
    return image.resize((size, size), Image.Resampling.BILINEAR)


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
    return image.resize(new_size, Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels, with zeros around an image that is smaller."""
    left, top = (_crop_start(length, size) for length in image.size)
    # Pillow fills with zeros what lies outside the image.
    return image.crop((left, top, left + size, top + size))


def get_preprocess(name: str) -> Preprocess:
    """The entry `name` of `PREPROCESSES`; ValueError if there is none."""
    if name not in PREPROCESSES:
        raise ValueError(f"unknown preprocessing {name!r}: choose from {', '.join(PREPROCESSES)}")
    return PREPROCESSES[name]


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
