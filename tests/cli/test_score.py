"""From images to a detector file, and from it to decisions, as users do it."""

import csv
import dataclasses
import io
import json
import os
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import gradnorm_jax as gj
from gradnorm_jax import cli
from gradnorm_jax.data.preprocess import PREPROCESSES, scale
from gradnorm_jax.models import MODELS, load_model
from tests.evaluation import networks

BUILD = f"{__name__}:build"
PREPROCESS = "squash=6,mean=half,std=half"


def build():
    model = networks.build()
    return model, PREPROCESS


def build_without_preprocess():
    return networks.build()


@pytest.fixture(scope="module")
def detector(make_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "energy.safetensors"
    folder = make_folder(40, seed=7)
    cli.main(calibrate_command(path, folder, "--detector", "energy"))
    return path


def calibrate_command(path, folder, *options, model=BUILD):
    return ["calibrate", "--model", model, "--id", str(folder), "--out", str(path), *options]


@pytest.fixture(scope="module")
def folder(make_folder):
    """Five images, and one that is out-of-distribution: all of one colour."""
    folder = make_folder(5, seed=8)
    Image.new("RGB", (12, 10), (255, 255, 255)).save(folder / "white.png")
    return folder


def score(detector, *arguments):
    """The status of the command."""
    try:
        cli.main(["score", str(detector), *map(str, arguments), "--trust", __name__])
    except SystemExit as end:
        return end.code
    return 0


def expected(detector, folder):
    """The decisions by the library."""
    calibrated = gj.load_detector(detector, trust=[__name__])
    files = sorted(folder.glob("*.png"))
    pixels = [calibrated.preprocess.pixels(Image.open(file).convert("RGB")) for file in files]
    return [str(file) for file in files], calibrated.decide(np.stack(pixels))


def test_calibration_says_what_it_promises(make_folder, tmp_path, capsys):
    line = calibrate_command(
        tmp_path / "d.safetensors", make_folder(60), "--detector", "gradnorm(ord=2)", "--confident"
    )
    cli.main(line)
    printed = capsys.readouterr().out
    assert "gradnorm(ord=2) on 60 images: in-distribution from a score of" in printed
    assert "true positive rate of at least 0.95 with confidence 0.95" in printed
    assert f"calibrated: {tmp_path}/d.safetensors" in printed
    loaded = gj.load_detector(tmp_path / "d.safetensors", networks.build())
    assert (loaded.tpr, loaded.confident, loaded.calibration_scores.size) == (0.95, True, 60)


@pytest.mark.parametrize("batch_size", [64, 1])
def test_every_image_gets_a_line(detector, folder, batch_size, capsys):
    files, decision = expected(detector, folder)
    arguments = (folder, "--format", "jsonl", "--batch-size", batch_size)
    assert score(detector, *arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == files
    for name in ("score", "p_value", "is_ood", "prediction"):
        np.testing.assert_allclose(
            [row[name] for row in rows], getattr(decision, name), rtol=1e-5, err_msg=name
        )
    assert list(rows[0]) == ["file", "score", "p_value", "is_ood", "prediction"]


def test_formats_tell_the_same(detector, folder, capsys):
    printed = {}
    for name in ("table", "csv", "jsonl"):
        assert score(detector, folder / "000.png", "--format", name) == 0
        printed[name] = capsys.readouterr().out.splitlines()
    row = json.loads(printed["jsonl"][0])
    (from_csv,) = csv.DictReader(printed["csv"])
    assert {key: str(value) for key, value in row.items()} == from_csv
    header, line = printed["table"]
    assert header.split() == ["score", "p-value", "class", "file"]
    verdict = "out" if row["is_ood"] else "in"
    shown = [f"{row['score']:.6g}", f"{row['p_value']:.3g}", verdict, str(row["prediction"])]
    assert line.split() == [*shown, row["file"]]


def test_the_status_tells_of_what_is_out(detector, folder, tmp_path, capsys):
    files, decision = expected(detector, folder)
    (inside, *_), (outside, *_) = (
        [f for f, out in zip(files, decision.is_ood, strict=True) if out == which]
        for which in (False, True)
    )
    assert score(detector, inside, "--fail-on-ood") == 0
    assert score(detector, inside, outside) == 0
    assert score(detector, inside, outside, "--fail-on-ood") == 3
    assert score(detector, tmp_path / "nothing.png", outside, "--fail-on-ood") == 65


def test_bad_images_stop_no_others(detector, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / name for name in ("cut.png", "text.png", "no.png", "a\x1b[31m.png")}
    names["cut.png"].write_bytes((folder / "000.png").read_bytes()[:60])
    names["text.png"].write_text("text")
    names["a\x1b[31m.png"].write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    shutil.copy(folder / "000.png", tmp_path / "good\n.png")
    bad = [*names.values(), tmp_path / "pipe.png", tmp_path / "empty"]
    for name in ("table", "csv"):
        arguments = (*bad, tmp_path / "good\n.png", folder / "001.png", "--format", name)
        assert score(detector, *arguments, "--batch-size", 2) == 65
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 3
        assert r"good\n.png" in out
        assert "gradnorm-jax: 6 of 8 images could not be scored" in err
        assert err.count("gradnorm-jax: ") == 7
        assert "no.png: No such file or directory" in err
        assert r"a\x1b[31m.png: the file is empty" in err
        assert "pipe.png: it is no regular file" in err
        assert "empty: the folder" in err
        assert "\x1b" not in out + err


def test_names_come_from_standard_input(detector, folder, monkeypatch, capsys):
    names = f"{folder / '001.png'}\n\n{folder / '000.png'}\r\n".encode() + b"/nowhere/\xff\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    assert score(detector, "-", "--format", "jsonl") == 65
    out, err = capsys.readouterr()
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert files == [str(folder / "001.png"), str(folder / "000.png")]
    assert r"/nowhere/\xff: No such file" in err


def test_decisions_together_keep_a_false_discovery_rate(detector, folder, capsys):
    _, decision = expected(detector, folder)
    for fdr in (0.01, 0.9):
        assert score(detector, folder, "--format", "jsonl", "--fdr", fdr) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        called = gj.benjamini_hochberg(decision.p_value, fdr)
        np.testing.assert_array_equal([row["is_ood"] for row in rows], called)
    assert called.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.safetensors", "x.png"], "there is no detector file nowhere.safetensors"),
        (["{detector}"], "no image is given"),
        (["{detector}", "x.png"], r"names code in the module .* --trust .*test_score,"),
        (["{detector}", "x.png", "--trust", __name__, "--batch-size", "0"], "at least 1: 0"),
        (["{detector}", "x.png", "--trust", __name__, "--fdr", "5"], "fdr must be above 0 and"),
    ],
)
def test_what_is_refused(detector, arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["score", *(each.format(detector=detector) for each in arguments)])


def test_what_cannot_be_calibrated(make_folder, tmp_path):
    folder = make_folder(20)
    path = tmp_path / "d.safetensors"
    few = calibrate_command(path, folder, "--confident")
    with pytest.raises(SystemExit, match="20 calibration scores are too few"):
        cli.main(few)
    without = calibrate_command(path, folder, model=f"{__name__}:build_without_preprocess")
    with pytest.raises(SystemExit, match=r"returns no Preprocess .* or give --preprocess"):
        cli.main(without)
    assert not path.exists()


@pytest.mark.slow
def test_a_known_network_with_its_weights_in_the_file(
    weights, make_folder, tmp_path, monkeypatch, capsys
):
    shifted = dataclasses.replace(MODELS["bit_tiny"], label_offset=1)
    monkeypatch.setitem(MODELS, "bit_tiny", shifted)
    path, folder = tmp_path / "bit.safetensors", make_folder(20)
    options = ("--weights", str(weights), "--with-weights", "--detector", "msp")
    cli.main(calibrate_command(path, folder, *options, model="bit_tiny"))
    assert gj.load_detector(path).preprocess == PREPROCESSES["bit32"]
    capsys.readouterr()
    assert score(path, folder, "--format", "jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, files = load_model("bit_tiny", weights), sorted(folder.glob("*.png"))
    pixels = [PREPROCESSES["bit32"].pixels(Image.open(file)) for file in files]
    logits = model(scale(jnp.asarray(np.stack(pixels)), PREPROCESSES["bit32"])).logits
    assert [row["prediction"] for row in rows] == (logits.argmax(axis=1) - 1).tolist()
