"""Files and sources for tests of data sets."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from gradnorm_jax.data.preprocess import Preprocess, centre_crop
from gradnorm_jax.data.source import Record


def make(folder: Path, *files: str) -> Path:
    """Files whose contents are their names; sources do not decode."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    return folder


def records(source):
    return [source[i] for i in range(len(source))]


def png(seed: int) -> bytes:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def grey_pixel(value: int) -> bytes:
    """An image of one pixel."""
    with io.BytesIO() as file:
        Image.new("L", (1, 1), value).save(file, "PPM")
        return file.getvalue()


def first_pixel(image):
    return centre_crop(image, 1)


ONE_PIXEL = Preprocess("one_pixel", 1, first_pixel, (0, 0, 0), (1, 1, 1))


class MadeSource(NamedTuple):
    """Image i is one pixel of grey i with label i % 3; those in `broken` are text."""

    length: int
    broken: tuple[int, ...] = ()
    name: str = "made"
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        data = b"text" if index in self.broken else grey_pixel(index)
        return Record(f"image-{index}", index % 3, data)

    def fingerprint(self):
        return f"{self.length} {self.broken}"
