"""Runs on object storage, and in folders that several processes share."""

import json
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import tensorstore as ts

from gradnorm_jax.cli import main
from gradnorm_jax.evaluation import folder as folders
from gradnorm_jax.evaluation.folder import lock, open_folder
from gradnorm_jax.evaluation.manifest import claim
from tests.evaluation.processes import (
    end,
    evaluate_command,
    one_device,
    start,
    start_all,
    succeed,
)

DETECTORS = ["--detectors", "msp", "mahalanobis", "gradnorm"]
MANIFEST = {"options": {"model": "m"}}


@pytest.fixture(scope="module", autouse=True)
def google():
    """What takes the place of Google Cloud Storage for this process and those it starts."""
    script = Path(__file__).with_name("fake_gcs.py")
    with (
        subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.stdout.readline().strip())
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield
        server.kill()


@pytest.fixture
def impatient(monkeypatch):
    """Two more tries at once."""
    retries = {"max_retries": 2, "initial_delay": "10ms"}
    monkeypatch.setattr(folders, "_CONTEXT", ts.Context({"gcs_request_retries": retries}))


@pytest.mark.parametrize("bucket", ["bucket", "flaky"])
def test_files_are_read_as_written(bucket, impatient):
    folder = open_folder(f"gs://{bucket}/files")
    assert folder.names() == []
    assert folder.read("a/00.x") is None
    names = [f"{below}/{i:02}.x" for below in "ab" for i in range(20)]
    for name in names:
        folder.write(name, b"old")
        folder.write(name, name.encode())
    open_folder(f"gs://{bucket}/files-of-another").write("c", b"")
    assert folder.names() == names
    folder.write("b/.hidden", b"")
    assert folder.names("b/") == names[20:]
    assert folder.names("b/05") == ["b/05.x"]
    assert [folder.read(name).decode() for name in names] == names
    folder.delete("a/00.x")
    folder.delete("nothing")
    assert folder.names() == names[1:]


def together(functions):
    """Calls functions at the same moment, and returns what each returned or raised."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def call(index):
        barrier.wait()
        try:
            results[index] = functions[index]()
        except OSError as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=[i]) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("address", ["{}", "memory://{}", "gs://bucket{}"])
def test_one_of_several_creates_a_file(tmp_path, address):
    folder = open_folder(address.format(tmp_path))
    for name in "abcdefgh":
        contents = [b"%d" % i for i in range(8)]
        created = together([partial(folder.create, name, content) for content in contents])
        assert sorted(created) == [False] * 7 + [True]
        assert folder.read(name) == contents[created.index(True)]
        assert not folder.create(name, b"late")


@pytest.mark.parametrize("address", ["{}", "gs://bucket{}"])
def test_one_of_several_runs_gets_the_folder(tmp_path, address):
    for attempt in range(8):
        folder = open_folder(f"{address.format(tmp_path)}/{attempt}")
        manifests = [{"options": {"model": str(i)}} for i in range(4)]
        errors = together([partial(claim, folder, manifest) for manifest in manifests])
        winner = errors.index(None)
        assert json.loads(folder.read("config.json")) == manifests[winner]
        for i, error in enumerate(errors):
            if i != winner:
                expected = f"holds another run: options.model is '{winner}' there and '{i}' now"
                assert expected in str(error)


def test_equal_runs_may_share_a_bucket():
    folder = open_folder("gs://bucket/equal")
    assert together([partial(claim, folder, MANIFEST)] * 8) == [None] * 8


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("forbidden", r"^gs://forbidden/run/config.json cannot be read: .*forbidden says no$"),
        ("missing", r"^gs://missing/run/config.json cannot be written: .*missing says no$"),
        ("unlistable", r"^the files in gs://unlistable/run cannot be listed; ask for permission$"),
    ],
)
def test_what_is_refused_is_said_at_once(bucket, message):
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(OSError, match=message):
            claim(open_folder(f"gs://{bucket}/run"), MANIFEST)
        assert time.monotonic() < start + 1


def test_a_service_out_of_order_is_said_after_some_tries(impatient):
    with pytest.raises(OSError, match=r"cannot be read: .*All 2 retry attempts failed: [^\[]*$"):
        claim(open_folder("gs://overloaded/run"), MANIFEST)


def test_a_service_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(OSError, match=r"config.json cannot be read: no answer within 0\.1 s$"):
        claim(open_folder("gs://silent/run"), MANIFEST)


@pytest.fixture(scope="module")
def arguments(make_folder, weights):
    options = {
        "model": "bit_tiny",
        "weights": weights,
        "id": make_folder(41, classes=3),
        "fit": make_folder(50, classes=3, seed=3),
        "batch-size": 8,
        "cache": "float32",
    }
    sets = ["--ood", f"near={make_folder(19, seed=1)}", f"far={make_folder(3, seed=2)}"]
    return [*evaluate_command(options), *sets, *DETECTORS]


@pytest.fixture(scope="module")
def environment(google, tmp_path_factory):
    return one_device(tmp_path_factory.mktemp("compiled"))


def read_files(address):
    """The contents of all files of a run by their names, and its config as far as it matters."""
    folder = open_folder(address)
    found = {name: folder.read(name) for name in folder.names()}
    config = json.loads(found.pop("config.json"))
    del config["options"]["out"]
    return found, config


@pytest.mark.slow
def test_a_run_in_a_bucket(environment, arguments, tmp_path):
    local, out, other = tmp_path / "run-1", "gs://bucket/run-1", tmp_path / "other"
    succeed(start(environment, *arguments, "--out", local))

    killed = start(environment, *arguments, "--out", out)
    while not open_folder(out).names("scores/"):
        assert killed.poll() is None, end([killed])
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert end([killed])[0][-1] == -signal.SIGKILL
    assert open_folder(out).read("metrics.json") is None
    succeed(start(environment, *arguments, "--out", out))
    files, config = read_files(local)
    assert "cache/fit/features/c/6/0" in files
    assert read_files(out) == (files, config)

    with pytest.raises(SystemExit, match=r"holds another run: options.temperature is 1.0 there"):
        main([*arguments, "--out", out, "--temperature", "2"])
    main(["evaluate", "--from-cache", out, *DETECTORS, "--out", str(other)])
    figures = json.loads((other / "metrics.json").read_text())
    expected = json.loads(files["metrics.json"])
    assert figures["metrics"]["msp"] == expected["metrics"]["msp"]
    assert figures["accuracy"] == expected["accuracy"]


@pytest.mark.slow
def test_two_processes_share_a_bucket(environment, arguments):
    succeed(*start_all(environment, 2, *arguments, "--out", "gs://bucket/two"))
    folder = open_folder("gs://bucket/two")
    rows = "scores/near.parquet/00000-0000"
    assert folder.names("scores/near") == [f"{rows}0.parquet", f"{rows}1.parquet"]
    assert folder.read("metrics.json")


@pytest.mark.slow
def test_a_folder_that_processes_do_not_share(environment, arguments, tmp_path):
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    first, second = end(start_all(environment, 2, *arguments, "--out", "run", places=places))
    assert first[2] == second[2] == 1
    assert "process 1 of 2 has failed" in first[0]
    assert "process 1 does not find in run what process 0 has written" in second[0]
    assert not list(places[1].iterdir())


@pytest.mark.slow
def test_a_folder_that_another_run_holds_is_refused_to_all(environment, arguments, tmp_path):
    with lock(open_folder(tmp_path / "run")):
        first, second = end(start_all(environment, 2, *arguments, "--out", tmp_path / "run"))
    assert first[2] == second[2] == 1
    assert "another run is writing to" in first[0]
    assert "process 0 of 2 has failed" in second[0]
    assert not list((tmp_path / "run").iterdir())
