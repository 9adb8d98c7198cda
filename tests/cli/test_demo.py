import jax
import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.cli.demo import DemoOptions, run_demo
from gradnorm_jax.cli.demo_data import OOD_SETS, write_images
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.data.open_source import open_source


def test_images_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    write_images(tmp_path / "images")
    digits = load_digits()
    train, test = (open_source(str(tmp_path / "images" / part)) for part in ("train", "test"))
    assert len(train) + len(test) == (digits.target < 6).sum()
    assert set(train.labels) == set(test.labels) == set(range(6))
    held_out = open_source(str(tmp_path / "images" / OOD_SETS[0]))
    assert len(held_out) == (digits.target >= 6).sum()
    first = np.asarray(Image.open(tmp_path / "images" / "test" / "0" / "0000.png"))
    np.testing.assert_array_equal(first, np.round(digits.images[0] * 255 / 16))


@pytest.mark.slow
def test_demo_is_the_evaluation_of_what_it_leaves(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix types
        result = run_demo(DemoOptions(out=tmp_path / "demo", steps=60))
    assert result.accuracy > 0.9
    assert list(result.metrics) == ["msp", "odin", "mahalanobis", "energy", "gradnorm"]
    images = tmp_path / "demo" / "images"
    again = run_evaluate(
        EvaluateOptions(
            model="bit_tiny",
            weights=tmp_path / "demo" / "weights.npz",
            id=str(images / "test"),
            ood=(tuple(f"{name}={images / name}" for name in OOD_SETS),),
            fit=str(images / "train"),
            out=tmp_path / "again",
        )
    )
    assert again.metrics == result.metrics
    with pytest.raises(FileExistsError, match="demo already exists and is not empty"):
        run_demo(DemoOptions(out=tmp_path / "demo"))
