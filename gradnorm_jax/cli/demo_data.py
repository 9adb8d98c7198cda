"""Real images that come with scikit-learn, as folders of files."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from gradnorm_jax.extras import needs_extra

ID_DIGITS = range(6)
OOD_SETS = ("digits_6_to_9", "photos", "photos_8x8")


def write_images(folder: Path) -> None:
    """Writes `train` and `test` with class subfolders, and a folder for each of `OOD_SETS`.

    In-distribution are the handwritten digits 0 to 5 (8 x 8 pixels; every third image is for
    testing). Out-of-distribution are the digits 6 to 9, squares of 32 x 32 pixels of two colour
    photographs, and squares of the same photographs reduced to the size and greys of the digits.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        OSError: the images cannot be written.
    """
    with needs_extra("demo", "the demo's images"):
        from sklearn.datasets import load_digits, load_sample_images
    folder.mkdir(parents=True)
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for label in ID_DIGITS:
        of_class = pixels[digits.target == label]
        test = np.arange(len(of_class)) % 3 == 0
        _save(folder / "train" / str(label), of_class[~test])
        _save(folder / "test" / str(label), of_class[test])
    _save(folder / "digits_6_to_9", pixels[~np.isin(digits.target, ID_DIGITS)])
    photographs = load_sample_images().images
    _save(folder / "photos", _squares(photographs, 32))
    reduced = (Image.fromarray(x).convert("L").resize((8, 8)) for x in _squares(photographs, 32))
    _save(folder / "photos_8x8", map(np.asarray, reduced))


def _squares(photographs: Iterable[np.ndarray], side: int) -> list[np.ndarray]:
    """All squares of a grid laid over each photograph."""
    return [
        photograph[top : top + side, left : left + side]
        for photograph in photographs
        for top in range(0, photograph.shape[0] - side + 1, side)
        for left in range(0, photograph.shape[1] - side + 1, side)
    ]


def _save(folder: Path, images: Iterable[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:04d}.png")
