"""The README's Python is run as it stands there; its command lines are parsed."""

import re
import shlex
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gradnorm_jax.cli.commands import parse
from gradnorm_jax.cli.evaluate import EvaluateOptions
from gradnorm_jax.detectors import parse_detectors

README = Path(__file__).parents[1] / "README.md"


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(5)(nn.relu(x).mean(axis=(1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)).mean(axis=(1, 2)))


def function(params, images):
    return jnp.tanh(images.mean(axis=(1, 2)) @ params["body"]) @ params["head"]["kernel"]


def test_the_code_in_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    many = rng.normal(size=(60, 8, 8, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    names = {
        "images": images,
        "module": Linen(),
        "variables": Linen().init(keys[0], images, train=False),
        "nnx_module": Nnx(nnx.Rngs(0)),
        "function": function,
        "params": {
            "body": jax.random.normal(keys[0], (3, 8)),
            "head": {"kernel": jax.random.normal(keys[1], (8, 5))},
        },
        "train_images": many,
        "train_labels": np.arange(60) % 5,
        "test_images": many[:20],
        "test_labels": np.arange(20) % 5,
        "noise_images": 3 * many[20:],
        "flipped_batches": lambda: iter(np.split(many[:, ::-1], 4)),
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        exec(block, names)
        assert names["model"](images).logits.shape == (4, 5)
    assert names["scores"].shape == (4,)
    assert names["result"].scores["max_logit", "noise"].shape == (40,)
    assert names["decision"].is_ood.shape == names["calibrated"].p_value(images).shape == (4,)
    assert "mahalanobis" in capsys.readouterr().out


def test_the_commands_in_the_readme_are_understood():
    text = README.read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^ {4}gradnorm-jax (.*)", text, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        line = command.replace("...", "--id i --ood o=o --out runs")
        options = parse(shlex.split(line, comments=True))
        if isinstance(options, EvaluateOptions):
            assert parse_detectors(sum(options.detectors, ()) or ("msp",))


def test_checks_run_the_test_command_of_the_readme():
    (command,) = re.findall(r"Run the tests:\n\n    (.*)", README.read_text(encoding="utf-8"))
    lines = (README.parent / ".ci" / "run").read_text(encoding="utf-8").replace("--quiet ", "")
    assert command in lines.splitlines()
