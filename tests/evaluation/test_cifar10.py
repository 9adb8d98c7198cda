"""CIFAR-10 ResNet-20, from a plain function to the table, against independent figures.

They were computed with PyTorch, on all 10,000 test images as ID, and are FPR95 / AUROC in percent.
"""

import gzip
import io
import json

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import gradnorm_jax as gj
from gradnorm_jax.cli import main
from tests import resnet20

pytestmark = pytest.mark.slow

FIGURES = {
    ("msp", "cifar100"): (73.02, 85.97),
    ("energy", "cifar100"): (58.64, 88.04),
    ("gradnorm", "cifar100"): (70.52, 78.85),
    ("msp", "textures"): (67.83, 87.96),
    ("energy", "textures"): (50.83, 90.38),
    ("gradnorm", "textures"): (36.33, 88.93),
    ("msp", "scenes"): (72.00, 86.26),
    ("energy", "scenes"): (52.00, 89.97),
    ("gradnorm", "scenes"): (46.40, 88.51),
    ("msp", "mnist"): (59.45, 91.57),
    ("energy", "mnist"): (13.00, 97.76),
    ("gradnorm", "mnist"): (0.15, 99.76),
}
DETECTORS = ("msp", "energy", "gradnorm")


def read_parquet(path):
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(100):
        yield {
            "image": [
                Image.open(io.BytesIO(data)).convert("RGB") for data in batch["image"].to_pylist()
            ],
            "label": batch["label"].to_numpy(),
            "id": batch["id"].to_pylist(),
        }


def read_mnist(path, count):
    digits = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
    images = map(Image.fromarray, digits.reshape(-1, 28, 28)[:count])
    return np.stack([np.asarray(x.convert("RGB").resize((32, 32), Image.BILINEAR)) for x in images])


def test_the_table_is_that_of_an_independent_implementation(shared_data, tmp_path):
    weights = shared_data / "weights" / "resnet20-12fca82f.th"
    model, preprocess = resnet20.build(weights)
    result = gj.evaluate(
        model,
        shared_data / "cifar" / "cifar10_test",
        {
            "cifar100": lambda: read_parquet(shared_data / "cifar" / "cifar100_test.parquet"),
            "textures": shared_data / "imagenet" / "ood_textures",
            "scenes": shared_data / "imagenet" / "ood_scenes",
            "mnist": read_mnist(shared_data / "cifar" / "t10k-images-idx3-ubyte.gz", 2000),
        },
        detectors=DETECTORS,
        preprocess=preprocess,
        batch_size=256,
    )
    assert round(100 * result.accuracy, 2) == 91.73
    for cell, (fpr95, auroc) in FIGURES.items():
        assert abs(100 * result[cell].fpr_at_95_tpr_id_positive.value - fpr95) < 0.05, cell
        assert abs(100 * result[cell].auroc.value - auroc) < 0.05, cell

    folders = [f"{name}={shared_data}/imagenet/ood_{name}" for name in ("textures", "scenes")]
    line = (
        f"--model tests.resnet20:build --weights {weights} --id {shared_data}/cifar/cifar10_test "
        f"--ood {folders[0]} --ood {folders[1]} --batch-size 256 --out {tmp_path}/out"
    )
    main(["evaluate", *line.split(), "--detectors", *DETECTORS])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert round(100 * metrics["accuracy"], 2) == 91.73
    for detector, cells in metrics["metrics"].items():
        for name, cell in cells.items():
            expected = result[detector, name].auroc.value
            assert abs(cell["auroc"]["value"] - expected) < 1e-6, (detector, name)
