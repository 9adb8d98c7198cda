"""Decoding of image files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Named, so that no file can start one of Pillow's exotic readers (PostScript runs a program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


class BadImage(ValueError):  # noqa: N818
    """An image that cannot be used; the message is the reason, in one sentence."""


def decode_rgb(data: bytes) -> Image.Image:
    """The image in a file, fully decoded, in mode RGB.

    The rule is torchvision's: of several frames the first, an orientation tag is not applied, alpha
    is dropped, and every other mode (grey, palette, CMYK, ...) is converted as Pillow does. The one
    exception is grey of more than 8 bits, which is reduced to its 8 highest bits of 16; Pillow's
    conversion would turn every value above 255, that is nearly every pixel, white. An image of
    floating-point numbers is refused: nothing tells whether they go up to 1, 255 or elsewhere.

    Args:
        data: the contents of a JPEG, PNG, BMP, WebP, GIF, TIFF, PPM or PGM file.

    Raises:
        BadImage: it is empty, of none of these formats, truncated, corrupt, or so large that Pillow
            takes it for a decompression bomb; or its pixels are floating-point numbers.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise BadImage(
            "the file is not an image of a known format, or its header is cut"
        ) from error
    except BadImage:
        raise
    except Exception as error:
        # Corrupt files make Pillow's readers raise nearly anything: OSError, SyntaxError,
        # struct.error, EOFError, DecompressionBombError, which share no narrower base.
        raise BadImage(
            f"the image cannot be decoded: {str(error) or type(error).__name__}"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, by the rule of `decode_rgb`; BadImage if there is none."""
    from PIL import Image

    if image.mode.startswith("F"):
        raise BadImage("its pixels are floating-point numbers of unknown scale; use 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # The high byte, as Pillow itself reads 16-bit colour. Mode I holds 16-bit values too: it is
        # what 16-bit PGM files, and 16-bit PNG files in older versions of Pillow, are read as.
        high = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    # Dropped with the alpha channel; Pillow would warn of every such palette image.
    image.info.pop("transparency", None)
    return image.convert("RGB")
