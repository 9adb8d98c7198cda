"""Real processes: several that share a run, and runs that are killed or stopped."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from tests.evaluation.processes import (
    end,
    evaluate_command,
    one_device,
    read_files,
    start,
    start_all,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return one_device(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def inputs(make_folder, weights):
    near = make_folder(19, seed=1)
    (near / "005.png").write_text("not an image")
    options = {
        "model": "bit_tiny",
        "weights": weights,
        "id": make_folder(41, classes=3),
        "fit": make_folder(50, classes=3, seed=3),
        "batch-size": 4,
        "max-bad": 0.1,
        "cache": "float32",
    }
    sets = ["--ood", f"near={near}", f"far={make_folder(3, seed=2)}"]
    detectors = ["--detectors", "msp", "mahalanobis", "gradnorm"]
    return [*evaluate_command(options), *sets, *detectors]


@pytest.fixture(scope="module")
def alone(environment, inputs, tmp_path_factory):
    """The folder of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    ((_, _, status),) = end([start(environment, *inputs, "--out", out)])
    assert status == 0
    return out


@pytest.mark.parametrize(("count", "devices_per_copy"), [(2, 1), (4, 1), (4, 2)])
def test_several_processes_find_what_one_finds(
    environment, inputs, alone, tmp_path, count, devices_per_copy
):
    arguments = [*inputs, "--devices-per-copy", devices_per_copy, "--out", tmp_path / "out"]
    ends = end(start_all(environment, count, *arguments))
    assert [status for _, _, status in ends] == [0] * count, ends
    assert "gradnorm" in ends[0][1]
    assert not any("gradnorm" in stdout for _, stdout, _ in ends[1:])
    for name in ("ID", "near", "far", "fit"):
        expected, table = (
            pyarrow.parquet.read_table(out / "scores" / f"{name}.parquet").sort_by("position")
            for out in (alone, tmp_path / "out")
        )
        for column in expected.column_names:
            if column in ("position", "id", "label", "prediction"):
                assert table[column].equals(expected[column])
            else:
                np.testing.assert_allclose(table[column], expected[column], rtol=2e-5)
    figures, expected = (
        json.loads((out / "metrics.json").read_text()) for out in (tmp_path / "out", alone)
    )
    assert figures == expected
    (excluded,) = figures["excluded"]["near"]
    assert (excluded["id"], excluded["position"]) == ("005.png", 5)


def test_one_process_can_use_the_cache_of_several(environment, inputs, alone, tmp_path):
    ends = end(start_all(environment, 2, *inputs, "--out", tmp_path / "two"))
    assert [status for _, _, status in ends] == [0, 0]
    again = ["evaluate", "--from-cache", tmp_path / "two", "--out", tmp_path / "again"]
    ((_, _, status),) = end([start(environment, *again, "--detectors", "msp", "gradnorm")])
    assert status == 0
    expected, figures = (
        json.loads((out / "metrics.json").read_text()) for out in (alone, tmp_path / "again")
    )
    assert figures["metrics"]["gradnorm"] == expected["metrics"]["gradnorm"]
    assert figures["accuracy"] == expected["accuracy"]


def test_a_run_that_is_killed_again_and_again(environment, inputs, tmp_path):
    script = Path(__file__).with_name("kill_runs.py")
    command = [sys.executable, script, tmp_path, "20", *inputs[1:]]
    subprocess.run(command, env=environment, check=True, timeout=900)
    expected = read_files(tmp_path / "undisturbed")
    assert "cache/fit/features/c/12/0" in expected
    killed = [path for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(killed) >= 4
    for folder in killed:
        assert read_files(folder) == expected, folder


def test_sigterm_stops_a_run_that_can_go_on(environment, inputs, alone, tmp_path):
    out = tmp_path / "out"
    process = start(environment | {"JAX_COMPILATION_CACHE_DIR": ""}, *inputs, "--out", out)
    wait_for(out / "config.json")  # the first step is being compiled
    process.send_signal(signal.SIGTERM)
    ((stderr, _, status),) = end([process])
    assert status == 75, stderr
    assert "stopped; start the same line again to go on" in stderr
    assert "Traceback" not in stderr
    assert (out / "scores" / "fit.parquet").exists()
    assert not (out / "metrics.json").exists()
    ((stderr, _, status),) = end([start(environment, *inputs, "--out", out)])
    assert status == 0, stderr
    assert read_files(out) == read_files(alone)


def test_sigterm_to_one_process_stops_all(environment, inputs, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    processes = start_all(environment | {"JAX_COMPILATION_CACHE_DIR": ""}, 2, *inputs, "--out", out)
    wait_for(out / "config.json")
    processes[1].send_signal(signal.SIGTERM)
    ends = end(processes)
    assert [status for _, _, status in ends] == [75, 75], ends
    assert not (out / "metrics.json").exists()
    for folder in (out, undisturbed):
        ends = end(start_all(environment, 2, *inputs, "--out", folder))
        assert [status for _, _, status in ends] == [0, 0], ends
    assert read_files(out) == read_files(undisturbed)


def test_all_processes_fail_if_one_does(environment, inputs, make_folder, tmp_path):
    folder = make_folder(200, seed=6)
    name = "103.png"  # is not among those that tell sources apart, and the second process's
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    arguments = [*inputs, "--ood", f"far={folder}", "--out", tmp_path / "out"]
    first, second = end(start_all(environment, 2, *arguments))
    assert "103.png" in second[0]
    assert "process 1 of 2 has failed; it says why" in first[0]
    assert first[2] == second[2] == 1


def test_a_second_run_in_the_same_folder(environment, inputs, tmp_path):
    out = tmp_path / "out"
    first = start(environment, *inputs, "--out", out)
    wait_for(out / "config.json")
    first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as it takes
    ((stderr, _, status),) = end([start(environment, *inputs, "--out", out)])
    first.send_signal(signal.SIGCONT)
    assert status == 1
    assert f"another run is writing to {out}" in stderr
    ((stderr, _, status),) = end([first])
    assert status == 0, stderr
