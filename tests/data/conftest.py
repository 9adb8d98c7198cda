from pathlib import Path

import pytest

from tests.data.files import make, png


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


@pytest.fixture
def listed(tmp_path):
    """Writes `set.csv` beside the folder `set` and returns its path."""

    def write(text, encoding="utf-8"):
        make(tmp_path / "set", "a.png", "b.png", "sub/c.png")
        path = tmp_path / "set.csv"
        path.write_text(text, encoding=encoding)
        return path

    return write
