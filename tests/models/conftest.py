import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FORMULA = Path(__file__).parents[2] / "experiments" / "goldens" / "formula.py"


@pytest.fixture(scope="session")
def formula():
    """Shapes of the published layouts and weights for them, which the goldens were made with."""
    return SimpleNamespace(**runpy.run_path(str(FORMULA)))


@pytest.fixture(scope="session")
def tiny_weights(formula):
    """A checkpoint of `bit_tiny` with seven classes."""
    weights = formula.bit_weights(formula.bit_shapes((1, 1, 1, 1), 16, 7))
    return {key: array.astype(np.float32) for key, array in weights.items()}


@pytest.fixture(scope="session")
def tiny_file(tiny_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **tiny_weights)
    return path
