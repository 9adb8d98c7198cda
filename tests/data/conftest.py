import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


@pytest.fixture
def make_images(tmp_path):
    """Writes images of random pixels, each different, and returns their folder."""

    def make(folder: str, *files: str) -> Path:
        for seed, file in enumerate(files):
            path = tmp_path / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(seed))
        return tmp_path / folder

    return make
