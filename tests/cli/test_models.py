"""The commands about networks and weights."""

import hashlib
import json

import flax.serialization
import jax
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax import cli
from gradnorm_jax.models import PUBLISHED, Published, load_model
from tests.evaluation.processes import evaluate_command
from tests.weights.server import serve


@pytest.fixture
def msgpack(weights, tmp_path):
    """The same weights as a training script of Flax saves them."""
    params = load_model("bit_tiny", weights).params
    path = tmp_path / "w.msgpack"
    path.write_bytes(flax.serialization.to_bytes({"params": params, "step": 3}))
    return path


@pytest.mark.parametrize("name", ["out.safetensors", "out.npz"])
def test_what_is_converted_is_the_same_network(weights, msgpack, tmp_path, capsys, name):
    out = tmp_path / name
    cli.main(["convert", str(msgpack), "--model", "bit_tiny", "-o", str(out)])
    assert capsys.readouterr().out == (
        f"converted: {out} (bit_tiny, 3 classes, 506,003 parameters, layout bit)\n"
    )
    pair = load_model("bit_tiny", weights).params, load_model("bit_tiny", out).params
    jax.tree.map(np.testing.assert_array_equal, *pair)


@pytest.mark.parametrize(
    ("source", "out", "sentence"),
    [
        ("{msgpack}", "w.pth", "written as .safetensors or .npz, got w.pth"),
        ("nothing.npz", "w.npz", "no weights file at nothing.npz"),
        ("BiT-S-R50-x1", "w.npz", "called 'BiT-S-R50-x1'; did you mean BiT-S-R50x1?"),
        ("BiT-S-R50x1", "w.npz", "of bit_r50x1 and not of bit_tiny: give --model bit_r50x1"),
    ],
)
def test_bad_input_ends_with_one_sentence(msgpack, source, out, sentence):
    source = source.format(msgpack=msgpack)
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", source, "--model", "bit_tiny", "-o", out])
    assert sentence in ended.value.code


def test_published_weights_are_evaluated_by_name(
    weights, make_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GRADNORM_JAX_CACHE", str(tmp_path / "cache"))
    content = weights.read_bytes()
    with serve(content) as site:
        digest = hashlib.sha256(content).hexdigest()
        row = Published(
            "tiny", "bit_tiny", f"{site.url}/file.npz", digest, "crop=8,mean=half,std=half"
        )
        monkeypatch.setitem(PUBLISHED, "tiny", row)
        data = {"id": make_folder(3), "ood": f"far={make_folder(3, seed=1)}"}
        options = {"model": "bit_tiny", "weights": "tiny", "out": tmp_path / "out", **data}
        cli.main(evaluate_command({**options, "detectors": "gradnorm"}))
    config = (tmp_path / "out" / "config.json").read_text()
    assert "crop" in config
    assert (tmp_path / "cache" / "weights" / "file.npz").read_bytes() == content


def test_models_are_listed(capsys):
    cli.main(["models", "bit_tiny", "mobilenet*"])
    printed = capsys.readouterr().out
    assert "mobilenet_v2" in printed
    assert "3,489,097" in printed
    assert "resnet" not in printed
    with pytest.raises(SystemExit, match="no architecture 'resnet0'"):
        cli.main(["models", "resnet0"])


def test_models_as_json(capsys):
    cli.main(["models", "bit_r50x1", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    weights = row.pop("weights")
    assert row == {
        "name": "bit_r50x1",
        "image_size": 480,
        "preprocess": "bit480",
        "classes": 1000,
        "features": 2048,
        "parameters": 25_549_352,
        "layouts": ["bit", "bit_pytorch", "gradnorm_ood", "flax"],
        "source": "google-research/big_transfer",
        "license": "Apache-2.0",
    }
    assert [each["name"] for each in weights] == [
        "BiT-S-R50x1",
        "BiT-M-R50x1",
        "BiT-M-R50x1-ILSVRC2012",
    ]


def test_in_python(weights, tmp_path):
    model = gj.models.convert(weights, "bit_tiny", tmp_path / "w.safetensors")
    again = gj.models.load_model("bit_tiny", tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
