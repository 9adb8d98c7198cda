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
    succeed,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(compiled):
    return one_device(compiled)


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
        "max-undecodable": 0.1,
        "cache": "float32",
    }
    sets = ["--ood", f"near={near}", f"far={make_folder(3, seed=2)}"]
    detectors = ["--detectors", "msp", "mahalanobis", "gradnorm"]
    return [*evaluate_command(options), *sets, *detectors]


@pytest.fixture(scope="module")
def alone(environment, inputs, tmp_path_factory):
    """The folder of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    succeed(start(environment, *inputs, "--out", out))
    return out


SMALL_PARTS = """
from gradnorm_jax.data import schedule
schedule.PART_SIZE = 8
from gradnorm_jax.cli import main
main()
"""


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_find_what_one_finds(environment, inputs, alone, tmp_path, count):
    out = tmp_path / "out"
    processes = [
        start(environment, *inputs, "--out", out, "--process", f"{i}/{count}", code=SMALL_PARTS)
        for i in range(count)
    ]
    ends = end(processes)
    assert [status for _, _, status in ends] == [0] * count, ends
    assert any("gradnorm" in stdout for _, stdout, _ in ends)
    assert all("has done its share" in stderr or "gradnorm" in out for stderr, out, _ in ends)
    for name in ("ID", "near", "far", "fit"):
        expected, table = (
            pyarrow.parquet.read_table(folder / "scores" / f"{name}.parquet").sort_by("position")
            for folder in (alone, out)
        )
        for column in expected.column_names:
            if column in ("position", "id", "label", "prediction"):
                assert table[column].equals(expected[column])
            else:
                np.testing.assert_allclose(table[column], expected[column], rtol=2e-5)
    metrics, expected = (json.loads((x / "metrics.json").read_text()) for x in (out, alone))
    assert metrics == expected
    (excluded,) = metrics["excluded"]["near"]
    assert (excluded["id"], excluded["position"]) == ("005.png", 5)
    again = ["evaluate", "--from-cache", out, "--out", tmp_path / "again"]
    succeed(start(environment, *again, "--detectors", "msp", "gradnorm"))
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["metrics"]["gradnorm"] == expected["metrics"]["gradnorm"]
    assert metrics["accuracy"] == expected["accuracy"]


def test_a_run_that_is_killed_again_and_again(environment, inputs, tmp_path):
    script = Path(__file__).with_name("kill_runs.py")
    command = [sys.executable, script, tmp_path, "20", *inputs[1:]]
    subprocess.run(command, env=environment, check=True, timeout=900)
    expected = read_files(tmp_path / "undisturbed")
    assert "cache/fit/000006.safetensors" in expected
    killed = [path for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(killed) >= 4
    for folder in killed:
        assert read_files(folder) == expected, folder


def test_sigterm_stops_a_run_that_can_resume(environment, inputs, alone, tmp_path):
    out = tmp_path / "out"
    process = start(environment | {"JAX_COMPILATION_CACHE_DIR": ""}, *inputs, "--out", out)
    wait_for(out / "config.json")  # the first batch is being compiled
    process.send_signal(signal.SIGTERM)
    ((stderr, _, status),) = end([process])
    assert status == 75, stderr
    assert "stopped; run the same command again to resume" in stderr
    assert "Traceback" not in stderr
    assert not (out / "metrics.json").exists()
    succeed(start(environment, *inputs, "--out", out))
    assert read_files(out) == read_files(alone)


def test_equal_runs_at_the_same_time_do_no_harm(environment, inputs, alone, tmp_path):
    out = tmp_path / "out"
    succeed(*(start(environment, *inputs, "--out", out) for _ in range(2)))
    assert read_files(out) == read_files(alone)
