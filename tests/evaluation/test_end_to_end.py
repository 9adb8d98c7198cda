"""The whole way on real images: data sets prepared for tfds, and runs of every kind from them."""

import csv
import json
import signal

import pytest

from tests.evaluation.processes import (
    end,
    one_device,
    read_files,
    start,
    succeed,
    wait_for,
)

pytestmark = pytest.mark.slow
SETS = {"id_val": 8, "ood_textures": 10, "ood_scenes": 10}
"""Of each set, every so many images."""


@pytest.fixture(scope="module")
def environment(compiled):
    return one_device(compiled)


@pytest.fixture(scope="module")
def data_dir(shared_data, environment, tmp_path_factory):
    """Data sets prepared by the command that users have for it."""
    folder, lists = tmp_path_factory.mktemp("prepared"), tmp_path_factory.mktemp("lists")
    images = shared_data / "imagenet"
    with (images / "id_val.csv").open() as file:
        labels = {row["file"]: row["label"] for row in csv.DictReader(file)}
    for name, step in SETS.items():
        rows = [(p, labels.get(p.name, -1)) for p in sorted((images / name).iterdir())[::step]]
        with (lists / f"{name}.csv").open("w") as file:
            csv.writer(file).writerows([("file", "label"), *rows])
        source = ["--from", lists / f"{name}.csv", "--data-dir", folder]
        ((stderr, stdout, status),) = end(
            [start(environment, "data", "prepare", f"some_{name}", *source)]
        )
        assert status == 0, stderr
        assert f"{len(rows)} images" in stdout
    return folder


@pytest.fixture(scope="module")
def arguments(shared_data, data_dir):
    weights = shared_data / "weights" / "mobilenet_v2_1.0_224.npz"
    return [
        *("evaluate", "--model", "mobilenet_v2", "--weights", weights, "--data-dir", data_dir),
        *("--id", "tfds:some_id_val", "--batch-size", "16"),
        *("--ood", "tfds:some_ood_textures", "tfds:some_ood_scenes"),
        *("--detectors", "msp", "odin", "energy", "gradnorm"),
    ]


@pytest.fixture(scope="module")
def alone(environment, arguments, tmp_path_factory):
    """The folder of an undisturbed run of one process with one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    succeed(start(environment, *arguments, "--out", out))
    assert json.loads((out / "metrics.json").read_text())["accuracy"] > 0.7
    return out


def table(folder):
    lines = (folder / "report.md").read_text().splitlines()
    return [line for line in lines if line.startswith("|")]


def test_eight_devices_give_the_same_table(environment, arguments, alone, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    succeed(start(environment | flags, *arguments, "--out", tmp_path / "out"))
    assert table(tmp_path / "out") == table(alone)


def test_two_processes_give_the_same_table(environment, arguments, alone, tmp_path):
    command = [*arguments, "--out", tmp_path / "out"]
    succeed(*(start(environment, *command, "--process", f"{i}/2") for i in range(2)))
    assert table(tmp_path / "out") == table(alone)


def test_a_run_killed_twice_gives_the_same_files(environment, arguments, alone, tmp_path):
    out = tmp_path / "out"
    for saved in ("ID", "some_ood_textures"):
        process = start(environment, *arguments, "--out", out)
        wait_for(out / "scores" / f"{saved}.parquet", timeout=120)
        process.send_signal(signal.SIGKILL)
        assert end([process])[0][-1] == -signal.SIGKILL
        assert not (out / "metrics.json").exists()
    succeed(start(environment, *arguments, "--out", out))
    assert read_files(out) == read_files(alone)
