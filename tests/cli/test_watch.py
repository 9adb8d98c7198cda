"""A folder that is watched while images arrive."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import gradnorm_jax as gj
from gradnorm_jax import cli
from gradnorm_jax.calibration import init_drift, update_drift
from gradnorm_jax.data import arrivals as arriving
from gradnorm_jax.data.arrivals import arrivals
from tests.cli.test_score import BUILD, calibrate_command

TRUST = BUILD.partition(":")[0]


@pytest.fixture(scope="module")
def detector(make_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "energy.safetensors"
    cli.main(calibrate_command(path, make_folder(100, seed=7), "--detector", "energy"))
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "stream"
    folder.mkdir()
    return folder


def drop(folder, names, seconds, white=False, seed=0):
    """Puts images there that have arrived at that time, one as good as another by its name."""
    rng = np.random.default_rng(seed)
    for name in names:
        pixels = np.full((12, 10, 3), 255) if white else rng.integers(256, size=(12, 10, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        os.utime(folder / name, (seconds, seconds))


def watch(detector, folder, *options):
    """The status of the command."""
    line = ["watch", str(detector), str(folder), "--interval", "0.01", "--trust", TRUST]
    try:
        cli.main([*line, *map(str, options)])
    except SystemExit as end:
        return end.code
    return 0


def rows_of(capsys):
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


ID = [f"{i:02d}.png" for i in reversed(range(20))]
WHITE = [f"w{i:02d}.png" for i in range(12)]


def test_a_shifted_stream_is_rejected(detector, folder, capsys):
    drop(folder, ID, 1000)
    drop(folder, WHITE, 2000, white=True)
    (folder / "cut.png").write_bytes(b"\x89PNG")
    (folder / "notes.txt").write_text("no image")
    assert watch(detector, folder, "--once", "--format", "jsonl") == 65
    rows, err = rows_of(capsys)
    order = [str(folder / name) for name in sorted(ID) + WHITE]
    assert [row["file"] for row in rows] == order
    assert [row["number"] for row in rows] == list(range(1, 33))
    calibrated = gj.load_detector(detector, trust=[TRUST])
    state = init_drift(calibrated.calibration_scores)
    _, drift = update_drift(state, [row["score"] for row in rows])
    np.testing.assert_allclose([row["drift_p_value"] for row in rows], drift.p_value, rtol=1e-6)
    since = int((drift.p_value <= 0.01).argmax()) + 1
    assert 20 < since <= 30
    assert f"is rejected at 1 % since image {since} ({order[since - 1]})" in err
    assert err.count("rejected") == 1
    assert "cut.png: " in err
    assert "1 of 33 images could not be scored" in err

    assert watch(detector, folder, "--once", "--fail-on-drift", "--format", "csv") == 3
    out, _ = capsys.readouterr()
    assert [row["file"] for row in csv.DictReader(out.splitlines())] == order[:since]


def test_a_stream_goes_on_where_its_log_ends(detector, folder, tmp_path, capsys):
    log = ("--log", tmp_path / "log", "--format", "jsonl")
    drop(folder, ID, 1000)
    assert watch(detector, folder, "--once", *log) == 0
    first, err = rows_of(capsys)
    assert "20 images: the in-distribution assumption stands at 1 %" in err
    drop(folder, WHITE, 500, white=True)  # an early date is no reason to be overlooked
    with open(tmp_path / "log", "a") as file:
        file.write('{"file": "w00')  # the power failed
    assert watch(detector, folder, "--idle-seconds", "0.05", *log) == 0
    second, err = rows_of(capsys)
    assert [row["number"] for row in first + second] == list(range(1, 33))
    assert "rejected at 1 % since image 2" in err
    assert watch(detector, folder, "--once", *log, "--fail-on-drift") == 3
    assert "rejected at 1 % since image 2" in capsys.readouterr().err
    assert len((tmp_path / "log").read_text().splitlines()) == 33

    assert "of another detector or --seed" in watch(detector, folder, *log, "--seed", 1)
    for text in ("text\n", "text"):
        (tmp_path / "other").write_text(text)
        assert "is not a log" in watch(detector, folder, "--log", tmp_path / "other")
        assert (tmp_path / "other").read_text() == text
    with open(tmp_path / "log") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another watch" in watch(detector, folder, "--once", *log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "1"], "alpha must be above 0 and below 1, got 1.0"),
        (["--interval", "0"], "interval must be above 0"),
        (["--batch-size", "0"], "batch_size and workers must be at least 1"),
    ],
)
def test_what_is_refused(detector, folder, options, message):
    assert message in watch(detector, folder, "--once", *options)
    assert "there is no folder" in watch(detector, folder / "nowhere")


def test_files_are_taken_once_and_whole(folder, monkeypatch):
    """What happens in the folder between one look and the next."""

    def write(name, content, modified):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        os.utime(folder / name, (modified, modified))

    between = [
        lambda: write("slow.png", b"half", 10),  # still being written
        lambda: write("slow.png", b"whole", 10),
        lambda: [write("b.png", b"b", 20), write("below/a.png", b"a", 20)],
        lambda: write("early.png", b"e", 5),
        lambda: write("bad.png", b"better", 30),
        lambda: write("used.png", b"again", 40),
        *[lambda: None] * 3,
    ]
    write("bad.png", b"bad", 1)
    write("used.png", b"used", 2)
    write(".hidden.png", b"x", 1)
    write("slow.png", b"", 10)
    done = {"earlier.png"}
    write("earlier.png", b"x", 1)
    monkeypatch.setattr(arriving.time, "sleep", lambda seconds: between.pop(0)())
    found = arrivals(folder, done, interval=1.0, idle_seconds=None)
    assert next(found) == ["bad.png", "used.png"]
    done.add("used.png")
    assert next(found) == ["slow.png"]
    assert next(found) == ["b.png", "below/a.png"]
    assert next(found) == ["early.png"]
    assert next(found) == ["bad.png"]  # it has changed
    with pytest.raises(IndexError):
        next(found)


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_log_is_kept(detector, folder, tmp_path):
    drop(folder, ID, 1000)
    command = [sys.executable, "-m", "gradnorm_jax", "watch", str(detector), str(folder)]
    log = tmp_path / "log"
    process = subprocess.Popen(
        [*command, "--trust", TRUST, "--log", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (log.exists() and len(log.read_bytes().splitlines()) == 21):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert len(out.splitlines()) == 21
    assert err == "gradnorm-jax: interrupted; run the same command again to resume\n"
