import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gradnorm_jax import cli
from gradnorm_jax.models import init_model, save_weights


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Good inputs, any of which a test can spoil."""
    import jax

    root = tmp_path_factory.mktemp("inputs")
    for name in ("id", "ood"):
        (root / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "empty").mkdir()
    save_weights(init_model("bit_tiny", 3, jax.random.key(0)).params, "bit_tiny", root / "w.npz")
    (root / "pickle.npz").write_bytes(b"\x80\x04K\x01.")
    (root / "used").mkdir()
    (root / "used" / "report.md").write_text("earlier results")
    return root


def arguments(root, **changes):
    options = {
        "model": "bit_tiny",
        "weights": root / "w.npz",
        "id": root / "id",
        "ood": f"far={root / 'ood'}",
        "detectors": "gradnorm",
        **changes,
    }
    return ["evaluate", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def test_evaluate_prints_the_table(inputs, tmp_path, capsys):
    cli.main(arguments(inputs, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "gradnorm" in printed
    assert "far" in printed
    assert (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "{root}/nowhere"}, "nowhere does not exist"),
        ({"ood": "far={root}/nowhere"}, "nowhere does not exist"),
        ({"fit": "{root}/nowhere"}, "nowhere does not exist"),
        ({"id": "{root}/empty"}, "empty holds no image"),
        ({"ood": "{root}/ood"}, "write NAME=PATH"),
        ({"ood": "ID={root}/ood"}, "'ID' is taken"),
        ({"ood": "a/b={root}/ood"}, "'a/b' cannot be the name of a file"),
        ({"model": "resnet"}, "no architecture 'resnet'"),
        ({"model": "mobilenet_v2"}, "another architecture"),
        ({"weights": "{root}/nothing.npz"}, "nothing.npz"),
        ({"weights": "{root}/pickle.npz"}, "pickle.npz"),
        ({"detectors": "nonsense"}, "unknown detector 'nonsense'; known: msp"),
        ({"detectors": "mahalanobis"}, "none of the detectors can be run"),
        ({"detectors": "mahalanobis", "fit": "{root}/id"}, "labels outside of 0..2"),
        ({"temperature": "0"}, "temperature must be positive and finite, got 0"),
        ({"batch-size": "0"}, "batch size must be at least 1, got 0"),
        ({"preprocess": "nonsense"}, "unknown preprocessing 'nonsense'"),
        ({"out": "{root}/used"}, "used already exists and is not empty"),
        ({"out": "{root}/used/report.md"}, "report.md already exists"),
    ],
)
def test_bad_input_ends_with_one_sentence(inputs, tmp_path, changes, message):
    changes = {"out": f"{tmp_path}/out"} | changes
    changes = {name: value.format(root=inputs) for name, value in changes.items()}
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments(inputs, **changes))
    sentence = str(ended.value.code)
    assert sentence.startswith("gradnorm-jax: ")
    assert message in sentence
    assert "\n" not in sentence
    # Nothing is in the way of another try.
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_the_installed_command(inputs, tmp_path):
    command = [sys.executable, "-c", "from gradnorm_jax.cli import main; main()"]
    result = subprocess.run(
        [*command, *arguments(inputs, out=tmp_path, model="resnet")], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "no architecture 'resnet'" in result.stderr
