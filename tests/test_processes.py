"""Shares of a run in processes of their own: killed, started again, started by schedulers."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from gradnorm_jax.evaluation.storage import open_folder, read_table
from tests.evaluation.processes import end, one_device, read_files, start, succeed, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "several_processes.md").read_text(encoding="utf-8")
MODEL = """
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import gradnorm_jax as gj
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data import schedule

schedule.PART_SIZE = 8


def wait(x):
    time.sleep(float(os.environ.get("SECONDS_PER_BATCH", 0)))
    return x


def apply(params, images):
    flat = images.reshape(len(images), -1)
    flat = jax.pure_callback(wait, jax.ShapeDtypeStruct(flat.shape, flat.dtype), flat)
    return jnp.tanh(flat @ params["body"]) @ params["head"]


def build():
    if "PIDS" in os.environ:
        open(os.path.join(os.environ["PIDS"], str(os.getpid())), "w").close()
    rng = np.random.default_rng(0)
    params = {"body": rng.normal(size=(768, 16)) / 28, "head": rng.normal(size=(16, 3))}
    params = {name: array.astype(np.float32) for name, array in params.items()}
    preprocess = get_preprocess("squash=16,mean=half,std=half")
    return gj.from_apply(apply, params, jnp.zeros((2, 16, 16, 3))), preprocess
"""
COMMAND = [
    *("evaluate", "--model", "my_model:build", "--id", "images/val", "--fit", "images/train"),
    *("--ood", "places=images/places", "--batch-size", "4"),
    *("--detectors", "msp", "mahalanobis", "gradnorm"),
]


@pytest.fixture(scope="module")
def environment(compiled):
    return one_device(compiled) | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def place(make_folder, tmp_path_factory):
    """The folder in which commands are started."""
    place = tmp_path_factory.mktemp("place")
    (place / "my_model.py").write_text(MODEL)
    (place / "images").mkdir()
    (place / "images" / "val").symlink_to(make_folder(37, classes=3))
    (place / "images" / "train").symlink_to(make_folder(61, classes=3, seed=1))
    (place / "images" / "places").symlink_to(make_folder(22, seed=2))
    return place


@pytest.fixture(scope="module")
def alone(environment, place):
    """The folder of one process."""
    succeed(start(environment, *COMMAND, "--out", "alone", cwd=place))
    return place / "alone"


def share(environment, place, out, process, seconds=0.0, *more):
    slow = environment | {"SECONDS_PER_BATCH": str(seconds)}
    return start(slow, *COMMAND, "--out", out, "--process", process, *more, cwd=place)


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert end([process])[0][-1] == -signal.SIGKILL


def assert_same(out, alone):
    """The same table, report and rows; only statistics are kept by each process."""
    found, expected = (
        {name: content for name, content in read_files(folder).items() if "statistics" not in name}
        for folder in (out, alone)
    )
    assert found.keys() == expected.keys()
    assert found["report.md"] == expected["report.md"]
    assert found["metrics.json"] == expected["metrics.json"]
    for name in ("ID", "places", "fit"):
        table, other = (read_table(open_folder(folder), name, 8) for folder in (out, alone))
        assert list(table.ids) == list(other.ids)
        assert len(set(table.ids)) == len(table.ids)
        chex.assert_trees_all_equal(table.predictions, other.predictions)
        chex.assert_trees_all_close(dict(table.scores), dict(other.scores), rtol=1e-6)


def test_one_after_another(environment, place, alone):
    """Fitted detectors want all processes, so those that come too early are started again."""
    for _ in range(2):
        ends = [
            end([share(environment, place, "turns", f"{i}/3", 0, "--wait", "0")])[0]
            for i in range(3)
        ]
    assert [status for _, _, status in ends] == [0, 0, 0]
    assert_same(place / "turns", alone)


def test_one_is_killed_while_it_scores(environment, place, alone):
    out = place / "scoring"
    first, second = (share(environment, place, out, f"{i}/2", 0.3) for i in range(2))
    wait_for(out / "scores" / "ID.parquet" / "000001.parquet")
    kill(second)
    ((stderr, _, status),) = end([first])
    assert status == 0, stderr
    assert "process 0 of 2 has done its share" in stderr
    assert not (out / "report.md").exists()
    succeed(share(environment, place, out, "1/2"))
    assert_same(out, alone)


def test_one_is_killed_while_the_other_waits_for_its_statistics(environment, place, alone):
    out = place / "fitting"
    second = share(environment, place, out, "1/2", 0.8)
    wait_for(out / "scores" / "fit.parquet" / "000001.parquet")
    # However long the other takes to start, this one must not finish before.
    second.send_signal(signal.SIGSTOP)
    first = share(environment, place, out, "0/2")
    wait_for(out / "statistics" / "00000-of-00002.safetensors")
    kill(second)
    time.sleep(2)
    assert first.poll() is None
    assert not (out / "scores" / "ID.parquet").exists()
    succeed(first, share(environment, place, out, "1/2"))
    assert_same(out, alone)


def test_one_is_killed_while_it_waits(environment, place, alone):
    out = place / "waiting"
    first = share(environment, place, out, "0/2")
    wait_for(out / "statistics" / "00000-of-00002.safetensors")
    kill(first)
    second = share(environment, place, out, "1/2")
    succeed(second, share(environment, place, out, "0/2"))
    assert_same(out, alone)


@pytest.mark.parametrize("more", [["--wait", "0"], []])
def test_who_waits_in_vain_or_is_stopped_can_resume(environment, place, more):
    out = place / f"vain{len(more)}"
    process = share(environment, place, out, "0/2", 0, *more)
    if not more:
        wait_for(out / "statistics" / "00000-of-00002.safetensors")
        process.send_signal(signal.SIGTERM)
    ((stderr, _, status),) = end([process])
    assert status == 75, stderr
    assert "process 1 of 2 has not finished fitting; run the same command again" in stderr


@pytest.mark.parametrize(
    ("number", "count"),
    [("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")],
)
def test_launchers_tell_who_a_process_is(environment, place, alone, number, count):
    out = place / number
    arguments = [*COMMAND, "--out", out, "--distributed", "auto"]
    first, second = (
        start(environment | {number: str(i), count: "2"}, *arguments, cwd=place) for i in range(2)
    )
    succeed(first, second)
    assert_same(out, alone)


def test_nobody_tells_who_a_process_is(environment, place):
    command = [*COMMAND, "--out", "out", "--distributed", "auto"]
    ((stderr, _, status),) = end([start(environment, *command, cwd=place)])
    assert status == 1
    assert "say which process this is with --process I/N" in stderr


PROGRAMS = {
    "gradnorm-jax": f'exec {sys.executable} -m gradnorm_jax "$@"',
    "srun": """
while [[ $1 == --* ]]; do shift; done
for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_STEP_NUM_TASKS=4 "$@" & done
wait""",
    "gcloud": """
while [[ $1 != --command ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_STEP_NUM_TASKS=2 bash -c "$2" & done
wait""",
}
"""What stands in for the programs that the page names."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for name, code in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
    return folder


def block_with(text, kind="bash"):
    (block,) = (x for x in re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) if text in x)
    return block


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("gcloud", [{}]),
        (
            "--array",
            [{"SLURM_ARRAY_TASK_ID": f"{i}", "SLURM_ARRAY_TASK_COUNT": "4"} for i in range(4)],
        ),
        ("srun", [{}]),
        ("JOB_COMPLETION_INDEX", [{"JOB_COMPLETION_INDEX": f"{i}"} for i in range(4)]),
        ("for i in", [{}]),
    ],
)
def test_the_lines_of_the_page(environment, programs, place, tmp_path, text, variables):
    """Each is run as it stands there, but for the address of its bucket, and gives one report."""
    code = block_with(text, "yaml" if text.isupper() else "bash")
    if text.isupper():
        code = " ".join(code.partition(">-")[2].split())
    code = code.replace("gs://my-bucket/run-1", "results")
    for name in ("my_model.py", "images"):
        (tmp_path / name).symlink_to(place / name)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    processes = [
        subprocess.Popen(
            ["bash", "-c", code],
            cwd=tmp_path,
            env=environment | path | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in variables
    ]
    succeed(*processes)
    assert "| gradnorm |" in (tmp_path / "results" / "report.md").read_text()


def test_tasks_of_ray(environment, place, alone, tmp_path):
    """Three shares on two CPUs, and a worker killed in the middle."""
    pytest.importorskip("ray")
    script = ROOT / "experiments" / "scale" / "ray_shares.py"
    assert f"{script.relative_to(ROOT)}" in PAGE
    process = subprocess.Popen(
        [sys.executable, script, "--shares", "3", *COMMAND[1:], "--out", "ray", "--wait", "2"],
        cwd=place,
        env=environment | {"PIDS": str(tmp_path), "SECONDS_PER_BATCH": "0.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(place / "ray" / "scores" / "fit.parquet" / "000001.parquet")
    os.kill(int(min(tmp_path.iterdir()).name), signal.SIGKILL)
    ((stderr, stdout, status),) = end([process], timeout=300)
    assert status == 0, stderr
    assert "gradnorm" in stdout
    assert len([*tmp_path.iterdir()]) > 3
    assert_same(place / "ray", alone)
