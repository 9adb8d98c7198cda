"""Runs on object storage, and in folders that several processes share."""

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation import storage
from gradnorm_jax.evaluation.records import ScoreTable
from gradnorm_jax.evaluation.run_config import claim_folder
from gradnorm_jax.evaluation.storage import (
    decode_arrays,
    decode_rows,
    encode_arrays,
    encode_rows,
    open_folder,
)
from tests.evaluation.processes import (
    end,
    evaluate_command,
    one_device,
    start,
    succeed,
)

CONFIG = {"model": "m", "versions": {}}


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
    monkeypatch.setattr(storage, "_TRIES", {"gcs_request_retries": retries})


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


@pytest.mark.parametrize("address", ["{}", "gs://bucket{}"])
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
        configs = [CONFIG | {"model": str(i)} for i in range(4)]
        errors = together([partial(claim_folder, folder, config) for config in configs])
        winner = errors.index(None)
        assert json.loads(folder.read("config.json")) == configs[winner]
        for i, error in enumerate(errors):
            if i != winner:
                expected = f"holds another run: model is '{winner}' there and '{i}' now"
                assert expected in str(error)


def test_equal_runs_may_share_a_bucket():
    folder = open_folder("gs://bucket/equal")
    assert together([partial(claim_folder, folder, CONFIG)] * 8) == [None] * 8


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
        with pytest.raises(OSError, match=message):
            claim_folder(open_folder(f"gs://{bucket}/run"), CONFIG)


def test_a_service_out_of_order_is_said_after_some_tries(impatient):
    with pytest.raises(OSError, match=r"cannot be read: .*All 2 retry attempts failed: [^\[]*$"):
        claim_folder(open_folder("gs://overloaded/run"), CONFIG)


def test_a_service_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(OSError, match=r"config.json cannot be read: no answer within 0\.1 s$"):
        claim_folder(open_folder("gs://silent/run"), CONFIG)


@pytest.mark.parametrize("address", ["{}/run", "{}/run/", "file://{}/run", "{}/a/../run"])
def test_addresses_of_one_folder(tmp_path, address):
    folder = open_folder(address.format(tmp_path))
    assert folder.names() == []
    folder.write("a/b", b"1")
    folder.write("a/b", b"22")
    folder.write("a/bc", b"3")
    assert (tmp_path / "run" / "a" / "b").read_bytes() == b"22"
    assert folder.read("a/b") == b"22"
    assert folder.names() == ["a/b", "a/bc"]
    assert folder.names("b/") == []
    folder.write("a/.hidden", b"4")
    assert folder.names("a/b") == ["a/b", "a/bc"]
    folder.delete("a/b")
    folder.delete("nothing")
    assert folder.names() == ["a/bc"]


def test_home_folder_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    open_folder("~/run").write("a", b"1")
    assert open_folder("run").read("a") == b"1"
    assert open_folder("./other/../run").read("a") == b"1"


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("a/b", b"1")
    with pytest.raises(OSError, match=r"/a cannot be written: [^\n\[]*$"):
        folder.write("a", b"1")
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError, match="file already exists and is not a folder"):
        open_folder(tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written"):
        open_folder(tmp_path / "file" / "x").write("a", b"1")


@pytest.mark.parametrize("address", ["nonsense://x", "memory://x/", "http://example.org/x"])
def test_other_kinds_of_storage_are_refused(address):
    with pytest.raises(ValueError, match=r"cannot write to .*: give a path or gs://"):
        open_folder(address)


def test_no_room(tmp_path):
    """A limit on the size of files takes the place of a full disk."""
    folder = open_folder(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"/a\.b cannot be written: .*File too large$"):
            folder.write("a.b", b"1" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.read("a.b") is None
    folder.write("a.b", b"1" * 1000)


KEPT = np.array([0, 1, 2, 4])
TABLE = ScoreTable(
    KEPT,
    [f"image-{i} ä" for i in KEPT],
    KEPT.astype(np.int32) - 1,
    KEPT.astype(np.int32) % 2,
    {"gradnorm(ord=2)": (1 / (KEPT + 1)).astype(np.float32), "msp": KEPT.astype(np.float32)},
    [Excluded("image-3", "it is broken", 3), Excluded("notes.txt", "no image")],
)


def test_rows_come_back(tmp_path):
    content = encode_rows(TABLE, {"outputs": "abc"})
    table, facts = decode_rows(content)
    assert facts == {"outputs": "abc"}
    for column, expected in zip(table[:4], TABLE[:4], strict=True):
        np.testing.assert_array_equal(column, expected)
    assert list(table.scores) == list(TABLE.scores)
    for name, scores in TABLE.scores.items():
        np.testing.assert_array_equal(table.scores[name], scores)
        assert table.scores[name].dtype == np.float32
    assert table.excluded == TABLE.excluded
    assert encode_rows(TABLE, {"outputs": "abc"}) == content
    (tmp_path / "rows.parquet").write_bytes(content)
    columns = pyarrow.parquet.read_table(tmp_path / "rows.parquet").column_names
    assert columns == ["position", "id", "label", "prediction", "gradnorm(ord=2)", "msp"]


def test_arrays_come_back():
    arrays = {
        "a": np.arange(6, dtype=np.float64).reshape(3, 2).T,
        "b": np.array([0.5, 3.0], jnp.bfloat16),
        "c": np.array([], np.int64),
        "d": np.array(3.0),
    }
    found = decode_arrays(encode_arrays(arrays))
    assert sorted(found) == sorted(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("decode", [decode_rows, decode_arrays])
@pytest.mark.parametrize("content", [b"", b"no such file", b"PAR1" * 5, b"\xff" * 40])
def test_damaged_files_are_known_by_their_errors(decode, content):
    with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind
        decode(content)


@pytest.mark.slow
def test_a_run_in_a_bucket(make_folder, weights, tmp_path, environment):
    """Killed once, and its cache read by another."""
    options = {
        "model": "bit_tiny",
        "weights": weights,
        "id": make_folder(41, classes=3),
        "fit": make_folder(50, classes=3, seed=3),
        "batch-size": 8,
        "cache": "float32",
    }
    sets = ["--ood", f"near={make_folder(19, seed=1)}", f"far={make_folder(3, seed=2)}"]
    detectors = ["--detectors", "msp", "mahalanobis", "gradnorm"]
    arguments = [*evaluate_command(options), *sets, *detectors]
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
    folders = [open_folder(address) for address in (local, out)]
    files, found = (
        {name: x.read(name) for name in x.names() if not name.startswith("journal/")}
        for x in folders
    )
    assert "cache/fit/000000.safetensors" in files
    assert found == files

    refused = start(environment, *arguments, "--out", out, "--temperature", "2")
    ((stderr, _, status),) = end([refused])
    assert status == 1
    assert "gradnorm.options.temperature is '1.0' there and '2.0' now" in stderr
    cached = ["evaluate", "--from-cache", out, *detectors, "--out", other]
    succeed(start(environment, *cached))
    metrics, expected = (
        json.loads(x) for x in ((other / "metrics.json").read_bytes(), files["metrics.json"])
    )
    assert metrics["metrics"]["msp"] == expected["metrics"]["msp"]
    assert metrics["accuracy"] == expected["accuracy"]


@pytest.fixture
def environment(google, compiled):
    return one_device(compiled)
