"""CIFAR-10 networks, from a file of weights to the table, against independent figures.

They were computed with PyTorch, on all 10,000 test images as ID, and are FPR95 / AUROC in percent.
Those of DenseNet on CIFAR-100 are of all its 10,000 test images, of which half are here.
"""

import gzip
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import gradnorm_jax as gj
from gradnorm_jax.cli import main
from gradnorm_jax.models import MODELS, load_model
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
DENSENET_FIGURES = {
    ("exact_msp", "textures"): (62.17, 88.76),
    ("energy", "textures"): (53.67, 87.79),
    ("gradnorm", "textures"): (42.67, 86.04),
    ("exact_msp", "scenes"): (56.40, 89.61),
    ("energy", "scenes"): (42.80, 91.49),
    ("gradnorm", "scenes"): (49.00, 85.20),
    ("exact_msp", "mnist"): (48.60, 93.98),
    ("energy", "mnist"): (3.55, 98.98),
    ("gradnorm", "mnist"): (0.00, 99.90),
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


def exact_msp(state, model, batch):
    """What ranks as MSP does in exact arithmetic: the logarithm of its odds, p / (1 - p).

    DenseNet is so sure of most images that their MSP is 1 in float32, or a unit or two in the last
    place less. How those are ranked is a matter of rounding, and so is the second digit of AUROC.
    """
    ordered = jnp.sort(batch.outputs.logits, axis=-1)
    return ordered[:, -1] - jax.nn.logsumexp(ordered[:, :-1], axis=-1)


def evaluate(model, preprocess, data, detectors=DETECTORS):
    return gj.evaluate(
        model,
        data / "cifar" / "cifar10_test",
        {
            "cifar100": lambda: read_parquet(data / "cifar" / "cifar100_test.parquet"),
            "textures": data / "imagenet" / "ood_textures",
            "scenes": data / "imagenet" / "ood_scenes",
            "mnist": read_mnist(data / "cifar" / "t10k-images-idx3-ubyte.gz", 2000),
        },
        detectors=detectors,
        preprocess=preprocess,
        batch_size=256,
    )


def assert_figures(result, figures):
    for cell, (fpr95, auroc) in figures.items():
        assert abs(100 * result[cell].fpr_at_95_tpr_id_positive.value - fpr95) < 0.05, cell
        assert abs(100 * result[cell].auroc.value - auroc) < 0.05, cell


def test_densenet_table_is_that_of_an_independent_implementation(shared_data):
    pytest.importorskip("torch", reason="needs torch to read the weights")
    model = load_model("densenet101_cifar", shared_data / "weights" / "densenet101_cifar10.pth.tar")
    detectors = (gj.Detector("exact_msp", "logits", exact_msp), "energy", "gradnorm")
    result = evaluate(model, MODELS["densenet101_cifar"].preprocess, shared_data, detectors)
    assert round(100 * result.accuracy, 2) == 94.54
    assert_figures(result, DENSENET_FIGURES)


def test_resnet_table_is_that_of_an_independent_implementation(shared_data, tmp_path):
    weights = shared_data / "weights" / "resnet20-12fca82f.th"
    model, preprocess = resnet20.build(weights)
    result = evaluate(model, preprocess, shared_data)
    assert round(100 * result.accuracy, 2) == 91.73
    assert_figures(result, FIGURES)

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
