import itertools
import resource
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from gradnorm_jax.data.split import Split
from gradnorm_jax.evaluation import shards
from gradnorm_jax.evaluation.cache import Cache
from gradnorm_jax.evaluation.folder import Folder, open_folder
from gradnorm_jax.evaluation.hosts import Interrupted
from gradnorm_jax.evaluation.passes import in_memory
from gradnorm_jax.evaluation.scoring import Feed, Step
from gradnorm_jax.evaluation.shards import in_folder
from gradnorm_jax.evaluation.table import Excluded, ScoreTable
from gradnorm_jax.types import Outputs

LENGTH, SPLIT, BROKEN = 21, Split(rows=3, process=0, processes=1), 7
FEED = Feed("made", LENGTH, (), None, None)
ZERO = {"detector": np.zeros(2)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two steps per file, saved after each."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 6)
    monkeypatch.setattr(shards, "SAVE_SECONDS", -1.0)


def make_step(number):
    """Position i has the score 1 / (i + 1), and adds 0.1 i to the statistics."""
    positions = np.arange(3 * number, 3 * number + 3)
    mask = positions != BROKEN
    kept = positions[mask]
    table = ScoreTable(
        kept,
        [f"image-{i}" for i in kept],
        kept.astype(np.int32) % 3,
        kept.astype(np.int32) % 2,
        {"score": (1 / (kept + 1)).astype(np.float32)},
        [] if mask.all() else [Excluded("image-7", "it is broken", BROKEN)],
    )
    columns = [np.outer(positions, np.ones(size, np.float32)) for size in (4, 2)]
    outputs = Outputs(*(jnp.asarray(x, jnp.float32) for x in columns))
    return Step(table, mask, outputs, {"detector": np.array([0.1 * kept.sum(), mask.sum()])})


def collect(folder, *, stop_at=None, fail_at=None, cache=False):
    """A pass into a folder, and which of its steps were carried out."""
    done = []

    def steps(start):
        for number in range(start, 7):
            if number == fail_at:
                raise ZeroDivisionError
            done.append(number)
            yield make_step(number)

    folder = open_folder(folder)
    kept = in_folder(
        folder, Cache(folder, "float32") if cache else None, lambda: done[-1] == stop_at
    )
    return kept(FEED, SPLIT, steps, ZERO), done


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(left, right):
    for a, b in zip(left[0][:4], right[0][:4], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(left[0].scores["score"], right[0].scores["score"])
    assert left[0].excluded == right[0].excluded
    np.testing.assert_array_equal(left[1]["detector"], right[1]["detector"])


def test_a_folder_keeps_what_memory_keeps(tmp_path):
    expected = in_memory(FEED, SPLIT, lambda start: map(make_step, range(start, 7)), ZERO)
    assert expected[0].excluded == [Excluded("image-7", "it is broken", 7)]
    assert expected[1]["detector"][1] == 20
    assert_same(collect(tmp_path / "run")[0], expected)
    again, done = collect(tmp_path / "run")
    assert_same(again, expected)
    assert done == []


def test_files_can_be_read_as_one_table(tmp_path):
    collect(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "scores" / "made.parquet")
    assert table["position"].to_pylist() == [i for i in range(LENGTH) if i != BROKEN]
    assert table["id"].to_pylist()[7] == "image-8"
    assert table["score"].to_pylist()[7] == np.float32(1 / 9)
    assert len(list((tmp_path / "scores" / "made.parquet").iterdir())) == 4


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("moment", range(7))
def test_a_stopped_pass_goes_on_where_it_was(tmp_path, moment, cache):
    whole, _ = collect(tmp_path / "whole", cache=cache)
    with pytest.raises(Interrupted):
        collect(tmp_path / "run", stop_at=moment, cache=cache)
    rest, done = collect(tmp_path / "run", cache=cache)
    assert done == list(range(moment + 1, 7))
    assert_same(rest, whole)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("seconds", [-1.0, 60.0])
@pytest.mark.parametrize("moment", range(7))
def test_a_pass_that_breaks_goes_on_from_what_was_saved(tmp_path, moment, seconds, monkeypatch):
    monkeypatch.setattr(shards, "SAVE_SECONDS", seconds)
    whole, _ = collect(tmp_path / "whole", cache=True)
    with pytest.raises(ZeroDivisionError):
        collect(tmp_path / "run", fail_at=moment, cache=True)
    rest, done = collect(tmp_path / "run", cache=True)
    assert done == list(range(moment if seconds < 0 else moment // 2 * 2, 7))
    assert_same(rest, whole)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("moment", range(1, 7))
def test_little_work_is_lost_between_saves(tmp_path, moment, monkeypatch):
    """Steps and saves of 25 seconds each, in files too large to be full before the end."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 1000)
    monkeypatch.setattr(shards, "SAVE_SECONDS", 60.0)
    clock = itertools.count(step=25.0)
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(ZeroDivisionError):
        collect(tmp_path, fail_at=moment)
    _, done = collect(tmp_path)
    assert done == list(range(moment // 3 * 3, 7))


def test_rows_saved_without_their_statistics_are_made_again(tmp_path):
    whole, _ = collect(tmp_path / "whole")
    (statistics,) = (tmp_path / "whole" / "statistics").iterdir()
    for stop_at in (2, 4):
        with pytest.raises(Interrupted):
            collect(tmp_path / "run", stop_at=stop_at)
        if stop_at == 2:
            earlier = (tmp_path / "run" / "statistics" / statistics.name).read_bytes()
    (tmp_path / "run" / "statistics" / statistics.name).write_bytes(earlier)
    rest, done = collect(tmp_path / "run")
    assert done == [3, 4, 5, 6]
    assert_same(rest, whole)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_file_is_named_and_made_again_once_deleted(tmp_path, damage):
    whole, _ = collect(tmp_path)
    expected = files(tmp_path)
    path = tmp_path / "scores" / "made.parquet" / "00001-00000.parquet"
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        # Within the first column's values.
        "flipped": content[:40] + bytes([content[40] ^ 1]) + content[41:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"00001-00000\.parquet is damaged: delete it"):
        collect(tmp_path)
    path.unlink()
    assert_same(collect(tmp_path)[0], whole)
    assert files(tmp_path) == expected


@pytest.mark.parametrize("kind", ["scores", "statistics"])
def test_an_earlier_state_put_back_by_an_equal_run_is_noticed(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 1000)
    with pytest.raises(Interrupted):
        collect(tmp_path / "run", stop_at=3)
    (path,) = (p for p in (tmp_path / "run" / kind).rglob("*") if p.is_file())
    earlier = path.read_bytes()
    expected, _ = collect(tmp_path / "run")
    write = Folder.write

    def write_and_put_back(folder, name, content):
        write(folder, name, content)
        path.write_bytes(earlier)

    path.write_bytes(earlier)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", write_and_put_back)
        with pytest.raises(ValueError, match=r"does not hold .* start"):
            collect(tmp_path / "run")
    assert_same(collect(tmp_path / "run")[0], expected)


def test_damaged_statistics(tmp_path):
    collect(tmp_path)
    (path,) = (tmp_path / "statistics").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"made-00000\.safetensors is damaged: delete it"):
        collect(tmp_path)
    path.unlink()
    assert collect(tmp_path)[1] == list(range(7))


def test_a_file_of_another_pass_is_not_taken_for_this_one(tmp_path):
    collect(tmp_path)
    scores = tmp_path / "scores" / "made.parquet"
    (scores / "00002-00000.parquet").write_bytes((scores / "00001-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match="does not hold each of the 21 images of made once"):
        collect(tmp_path)


def test_no_room(tmp_path):
    """A limit on the size of files takes the place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"00000-00000\.parquet cannot be written: .*File too large$"
        ):
            collect(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any((tmp_path / "scores" / "made.parquet").glob("*.parquet"))
    assert collect(tmp_path)[1] == list(range(7))


def test_memory_serves_one_process():
    with pytest.raises(ValueError, match="2 processes cannot share results kept in memory"):
        in_memory(FEED, Split(3, 0, 2), lambda start: iter(()), ZERO)


def test_results_can_be_kept_elsewhere_than_on_a_file_system():
    whole, done = collect("memory://run")
    assert len(whole[0].ids) == 20
    assert done == list(range(7))
