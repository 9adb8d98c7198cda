import json
import os
import signal

import jax
import numpy as np
import pytest

from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.split import Split
from gradnorm_jax.evaluation.folder import lock, open_folder
from gradnorm_jax.evaluation.hosts import connect, gather, preemption, split_evenly
from gradnorm_jax.evaluation.manifest import claim, describe_source, differences, environment
from gradnorm_jax.evaluation.run import _held
from gradnorm_jax.evaluation.scoring import image_feed
from gradnorm_jax.evaluation.table import Excluded, ScoreTable, covers, in_source_order


@pytest.mark.parametrize("address", ["{}/run", "{}/run/", "file://{}/run", "memory://{}"])
def test_files_are_read_as_written(tmp_path, address):
    folder = open_folder(address.format(tmp_path))
    assert folder.names() == []
    assert folder.read("a/b") is None
    folder.write("a/b", b"1")
    folder.write("a/b", b"22")
    folder.write("a/bc", b"3")
    assert folder.read("a/b") == b"22"
    assert folder.names() == ["a/b", "a/bc"]
    assert folder.names("a/") == ["a/b", "a/bc"]
    assert folder.names("b/") == []
    folder.write("a/.hidden", b"4")
    assert folder.names("a/b") == ["a/b", "a/bc"]
    folder.delete("a/b")
    folder.delete("nothing")
    assert folder.names() == ["a/bc"]


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("a/b", b"1")
    with pytest.raises(OSError, match=r"/a cannot be written: [^\n\[]*$"):
        folder.write("a", b"1")
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError, match="file already exists and is not a folder"):
        open_folder(tmp_path / "file")
    with pytest.raises(OSError, match="nonsense://x cannot be read"):
        open_folder("nonsense://x")
    with (
        pytest.raises(OSError, match="cannot be written"),
        lock(open_folder(tmp_path / "file" / "x")),
    ):
        pass


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = open_folder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("left by a run that was killed")
    with lock(folder) as locked:
        assert locked
        with (
            pytest.raises(BlockingIOError, match=r"another run is writing to .*/run; wait"),
            lock(folder),
        ):
            pass
        assert folder.names() == []
    with lock(folder):
        pass
    assert not list((tmp_path / "run").iterdir())
    with lock(open_folder("memory://run")) as locked:
        assert not locked


MANIFEST = {"options": {"model": "m", "ood": ("a",), "out": "x"}, "sources": {"ID": {"images": 3}}}


def test_a_folder_is_claimed_by_one_run(tmp_path):
    folder = open_folder(tmp_path)
    claim(folder, MANIFEST)
    claim(folder, MANIFEST | {"options": MANIFEST["options"] | {"out": "y"}})
    other = {"options": {"model": "n", "ood": ("a", "b")}, "sources": {"ID": {"images": 4}}}
    with pytest.raises(
        FileExistsError,
        match=r"holds another run: options.model is 'm' there and 'n' now, options.ood is \['a'\] "
        r"there and \['a', 'b'\] now, sources.ID.images is 3 there and 4 now; start it as it was "
        "to go on with it, or choose another --out",
    ):
        claim(folder, other)
    assert json.loads(folder.read("config.json"))["options"]["out"] == "x"


def test_other_processes_come_second(tmp_path, monkeypatch):
    folder = open_folder(tmp_path / "run")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(FileNotFoundError, match=r"process 1 does not find in .* that all .* share"):
        claim(folder, MANIFEST)
    assert not (tmp_path / "run").exists()


def test_foreign_files_are_left_alone(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("thesis.tex", b"")
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        claim(folder, MANIFEST)
    folder.write("config.json", b"not of a run")
    with pytest.raises(ValueError, match=r"config\.json is not that of a run"):
        claim(folder, MANIFEST)


@pytest.mark.parametrize(("address", "left"), [("{}", []), ("memory://{}", ["config.json"])])
def test_a_run_that_came_to_nothing_leaves_nothing_that_may_be_anothers(tmp_path, address, left):
    folder = open_folder(address.format(tmp_path))
    with pytest.raises(ZeroDivisionError), _held(folder, MANIFEST):
        raise ZeroDivisionError
    assert folder.names() == left


def test_differences_of_a_part():
    assert differences(MANIFEST, {"options": {"model": "m"}}) == ""
    assert differences(MANIFEST, {"weights": 1}) == "weights is None there and 1 now"
    assert differences({}, dict.fromkeys("abcd", 1)).endswith("c is None there and 1 now, ...")


def test_versions_and_devices_are_told():
    told = environment()
    assert told["processes"] == 1
    assert told["devices"] == {"cpu": 8}
    other = {**told, "devices": {"cpu": 1}, "processes": 2}
    assert differences(told, other) == (
        "devices.cpu is 8 there and 1 now, processes is 1 there and 2 now"
    )
    assert set(told["versions"]) >= {"python", "jax", "numpy", "gradnorm-jax"}


def test_sources_are_told_apart(make_folder):
    folder = make_folder(70, classes=2, seed=5)
    told = describe_source(open_source(str(folder)))
    assert told["images"] == 70
    assert told == describe_source(open_source(str(folder)))
    first = folder / "class0" / "000.png"
    content = first.read_bytes()
    first.write_bytes((folder / "class1" / "001.png").read_bytes())
    assert told != describe_source(open_source(str(folder)))
    first.write_bytes(content)
    assert told == describe_source(open_source(str(folder)))
    (folder / "class0" / "068.png").rename(folder / "class1" / "068.png")
    assert told != describe_source(open_source(str(folder)))


@pytest.mark.parametrize(("processes", "batch_size", "devices"), [(1, 5, 4), (2, 7, 4), (4, 1, 4)])
def test_positions_are_dealt_out_once(processes, batch_size, devices):
    splits = [split_evenly(batch_size, devices, i, processes) for i in range(processes)]
    assert splits[0].rows * processes == {5: 8, 7: 8, 1: 4}[batch_size]
    steps = splits[0].num_steps(21)
    dealt = [
        position
        for split in splits
        for step in range(steps)
        for position in range(split.first(step), split.first(step) + split.rows)
    ]
    assert sorted(dealt) == list(range(steps * splits[0].rows * processes))
    assert len(dealt) - 21 < splits[0].rows * processes


def test_rows_of_several_processes_in_source_order():
    positions = np.array([4, 5, 0, 1, 3])
    table = ScoreTable(
        positions,
        [str(i) for i in positions],
        positions * 10,
        positions * 100,
        {"score": positions / 2},
        [Excluded("6", "bad", 6), Excluded("2", "bad", 2)],
    )
    ordered = in_source_order(table)
    assert ordered.ids == ["0", "1", "3", "4", "5"]
    np.testing.assert_array_equal(ordered.labels, [0, 10, 30, 40, 50])
    np.testing.assert_array_equal(ordered.scores["score"], [0, 0.5, 1.5, 2, 2.5])
    assert [each.id for each in ordered.excluded] == ["2", "6"]
    assert covers(ordered, 7)
    assert not covers(ordered, 8)
    assert not covers(ordered._replace(excluded=[]), 7)
    assert not covers(table._replace(positions=np.array([4, 5, 0, 0, 3])), 7)


def test_sigterm_is_noted():
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as stop_here:
        assert not stop_here()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_here()
        assert stop_here()
    assert signal.getsignal(signal.SIGTERM) is before


def test_values_of_one_process():
    np.testing.assert_array_equal(gather(np.array([0.1, 2.0**-1074])), [[0.1, 2.0**-1074]])


def test_processes_are_numbered_from_zero():
    with pytest.raises(ValueError, match=r"process 2 of 2 is asked for: number .* from 0 to 1"):
        connect(("localhost:1", 2, 2))


@pytest.mark.parametrize("process", [0, 1, 2])
def test_a_split_is_what_the_loader_does(make_folder, process):
    source = open_source(str(make_folder(14)))
    split = Split(2, process, 3)
    feed = image_feed("made", source, get_preprocess("bit32"))
    chunks = list(feed.chunks(split, 1))
    assert len(chunks) == split.num_steps(14) - 1
    for step, chunk in enumerate(chunks, 1):
        expected = range(split.first(step), min(split.first(step) + 2, 14))
        assert chunk.positions.tolist() == list(expected)
