"""Real processes of one program, of which one fails or is killed."""

import functools
import os
import signal
import time

import jax
import pytest

from gradnorm_jax import cli
from tests.evaluation import processes
from tests.evaluation.processes import end, evaluate_command, one_device, read_files, wait_for

IMPATIENT = """
from gradnorm_jax.evaluation import peers
peers.PATIENCE_SECONDS = 8.0
from gradnorm_jax.cli import main
main()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return one_device(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def arguments(make_folder, weights):
    """Of many small steps, of which there are 50 for each set."""
    options = {
        "model": "bit_tiny",
        "weights": weights,
        "id": make_folder(200, classes=3),
        "batch-size": 4,
        "cache": "float32",
    }
    return evaluate_command(options)


start_all = functools.partial(processes.start_all, code=IMPATIENT)


def sentences(stderr):
    """What the command itself says."""
    return [line for line in stderr.splitlines() if line.startswith("gradnorm-jax: ")]


def kill_one(environment, out, *arguments):
    """Kills the second of two processes amid a data set, and sees how the first ends."""
    processes = start_all(environment, 2, *arguments, "--out", out)
    wait_for(out / "scores" / "ID.parquet")
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    (stderr, _, status), (_, _, killed_status) = end(processes)
    assert killed_status == -signal.SIGKILL
    assert status == os.EX_TEMPFAIL, stderr
    assert time.monotonic() < killed + 60
    assert sentences(stderr) == [
        "gradnorm-jax: process 1 of 2 is gone; start the same line again on all to go on"
    ]
    assert "Traceback" not in stderr
    assert not (out / "metrics.json").exists()


@pytest.mark.slow
def test_all_end_if_one_is_killed_and_go_on_together(environment, arguments, make_folder, tmp_path):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    arguments = [*arguments, "--ood", f"far={make_folder(200, seed=7)}"]
    kill_one(environment, out, *arguments)
    for folder in (out, undisturbed):
        ends = end(start_all(environment, 2, *arguments, "--out", folder))
        assert [status for _, _, status in ends] == [0, 0], ends
    assert read_files(out) == read_files(undisturbed)


@pytest.mark.slow
def test_all_end_if_one_is_killed_that_holds_a_part_of_the_parameters(
    environment, arguments, tmp_path
):
    same = arguments[arguments.index("--id") + 1]
    options = ["--ood", f"same={same}", "--devices-per-copy", 2]
    kill_one(environment, tmp_path / "out", *arguments, *options)


@pytest.mark.slow
@pytest.mark.parametrize("devices_per_copy", [1, 2])
@pytest.mark.parametrize("culprit", [0, 1])
def test_the_others_hear_at_once_of_one_that_fails(
    environment, arguments, make_folder, tmp_path, culprit, devices_per_copy
):
    folder = make_folder(200, seed=8)
    for i in range(40, 200):
        if i // 2 % 2 == culprit:
            (folder / f"{i:03}.png").write_text("not an image")
    sets = ["--ood", f"far={folder}", "--max-bad", "0.02", "--devices-per-copy", devices_per_copy]
    started = time.monotonic()
    ends = end(start_all(environment, 2, *arguments, *sets, "--out", tmp_path / "out"))
    assert time.monotonic() < started + 90
    assert [status for _, _, status in ends] == [1, 1], ends
    (said,), (heard,) = (sentences(ends[i][0]) for i in (culprit, 1 - culprit))
    assert "more than 4 of the 200 images of far cannot be decoded" in said
    assert heard == f"gradnorm-jax: process {culprit} of 2 has failed; it says why"
    assert not (tmp_path / "out" / "scores" / "far.parquet").exists()


@pytest.mark.slow
def test_off_a_cluster_the_processes_must_be_named(environment, arguments, tmp_path):
    command = [*arguments, "--out", tmp_path, "--ood", "far=nowhere", "--distributed", "auto"]
    ((stderr, _, status),) = end([processes.start(environment, *command)])
    assert status == 1
    assert "give the coordinator's HOST:PORT" in stderr
    assert "--distributed HOST:PORT PROCESSES THIS_ONE" in stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 GB.\nA list"),
            "gradnorm-jax: the devices are out of memory; give a smaller --batch-size: "
            "RESOURCE_EXHAUSTED: Out of memory, 9 GB.",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: it broke\nA stack"),
            "gradnorm-jax: the devices or their runtime have failed: INTERNAL: it broke",
        ),
        (RuntimeError("the loader stopped"), "gradnorm-jax: the loader stopped"),
    ],
)
def test_errors_of_the_runtime_are_one_sentence(monkeypatch, arguments, error, sentence):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--out", "nowhere"])
    assert ended.value.code == sentence
