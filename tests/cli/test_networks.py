"""Networks known by name, from a file of weights to the report, by one command."""

import json

import jax
import numpy as np
import pytest

from gradnorm_jax.cli import main
from gradnorm_jax.models import MODELS, save_weights
from gradnorm_jax.models.architecture import template

NETWORKS = {
    "resnet20_cifar": "gradnorm",
    "densenet101_cifar": "gradnorm",
    "wide_resnet40_2_cifar": "gradnorm",
    "resnet18": "gradnorm",
    "densenet121": "gradnorm",
    "vit_ti16": "gradnorm",
    "mobilenet_v2_torch": "gradnorm",
    "squeezenet1_1": "gradnorm(select=classifier/1/kernel)",
}


@pytest.mark.whole
@pytest.mark.parametrize("name", NETWORKS)
def test_one_command(name, make_folder, tmp_path):
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        # Positive, as variances have to be.
        lambda leaf: generator.uniform(0.5, 1.5, leaf.shape).astype("f") / max(1, leaf.size**0.5),
        template(MODELS[name], 3),
    )
    state = {key: tree for key, tree in variables.items() if key != "params"}
    save_weights(variables["params"], name, tmp_path / "w.npz", state=state)
    near, far = make_folder(4), make_folder(4, seed=1)
    line = f"--model {name} --weights {tmp_path}/w.npz --id {near} --ood far={far}"
    command = ["evaluate", *line.split(), "--batch-size", "8", "--out", str(tmp_path / "out")]
    main([*command, "--detectors", "msp", NETWORKS[name]])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"msp", NETWORKS[name]}
