import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

TEST_DATA = Path(
    os.environ.get("GRADNORM_JAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session")
def shared_data():
    """Real weights and images; tests that need them skip where they are absent."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"needs real weights and images in {TEST_DATA} (GRADNORM_JAX_TEST_DATA)")
    return TEST_DATA


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder in which processes that tests start share what they compile."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("compiled")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Makes folders of random images, with class subfolders if asked for."""

    def make(count, *, classes=None, seed=0):
        folder = tmp_path_factory.mktemp("images")
        pixels = np.random.default_rng(seed).integers(256, size=(count, 12, 10, 3), dtype=np.uint8)
        for i, image in enumerate(pixels):
            below = folder if classes is None else folder / f"class{i % classes}"
            below.mkdir(exist_ok=True)
            Image.fromarray(image).save(below / f"{i:03d}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file with random weights of `bit_tiny` for three classes."""
    from gradnorm_jax.models import init_model, save_weights

    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    save_weights(init_model("bit_tiny", 3, jax.random.key(0)).params, "bit_tiny", path)
    return path
