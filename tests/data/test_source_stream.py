import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.data.images import decode_rgb
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import PREPROCESSES
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source import Record
from gradnorm_jax.data.source_stream import Decoding, available_cpus, source_stream
from tests.data.files import ONE_PIXEL, MadeSource, grey_pixel


def load(source, schedule, preprocess=ONE_PIXEL, workers=2, **decoding):
    stream = source_stream(source, preprocess, Decoding(workers, **decoding))
    return list(stream.batches(schedule))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_by_hand():
    first, last = load(MadeSource(5, broken=(1,)), BatchSchedule(3))
    assert (first.number, last.number) == (0, 1)
    np.testing.assert_array_equal(first.data[:, 0, 0], [[0] * 3, [0] * 3, [2] * 3])
    np.testing.assert_array_equal(first.mask, [True, False, True])
    np.testing.assert_array_equal(first.positions, [0, 2])
    np.testing.assert_array_equal(first.labels, [0, 2])
    assert first.ids == ["image-0", "image-2"]
    (excluded,) = first.excluded
    assert (excluded.id, excluded.position) == ("image-1", 1)
    assert excluded.reason.startswith("the file is not an image")
    np.testing.assert_array_equal(last.data[:, 0, 0], [[3] * 3, [4] * 3, [0] * 3])
    np.testing.assert_array_equal(last.mask, [True, True, False])
    np.testing.assert_array_equal(last.positions, [3, 4])
    np.testing.assert_array_equal(last.labels, [0, 1])
    assert last.ids == ["image-3", "image-4"]
    assert not last.excluded
    dtypes = [last.data.dtype, last.labels.dtype, last.positions.dtype, last.mask.dtype]
    assert dtypes == [np.uint8, np.int32, np.int64, np.bool_]


def test_the_stream_describes_the_source():
    stream = source_stream(MadeSource(5, ignored=("a.txt",)), ONE_PIXEL)
    assert stream.length == 5
    assert stream.ignored == ("a.txt",)
    assert stream.identity() == {"inputs": 5, "sha256": "5 ()"}


@pytest.mark.parametrize("processes", range(1, 4))
def test_every_image_once_over_all_processes(processes):
    for length, batch_size in itertools.product((1, 2, 7, 12, 13), (1, 3, 4, 20)):
        source = MadeSource(length, broken=(length // 2,))
        schedules = [BatchSchedule(batch_size, 2, i, processes) for i in range(processes)]
        batches = [b for schedule in schedules for b in load(source, schedule, workers=1)]
        batches = sorted(batches, key=lambda batch: batch.number)
        assert [batch.number for batch in batches] == list(range(length // batch_size + 1))
        assert all(len(batch.data) == batch_size for batch in batches)
        expected = [i for i in range(length) if i != length // 2]
        assert np.concatenate([batch.positions for batch in batches]).tolist() == expected
        mask = np.concatenate([batch.mask for batch in batches])
        assert np.flatnonzero(mask).tolist() == expected
        pixels = np.concatenate([batch.data for batch in batches])[:, 0, 0, 0]
        np.testing.assert_array_equal(pixels, np.where(mask, np.arange(len(mask)), 0))
        excluded = [each.id for batch in batches for each in batch.excluded]
        assert excluded == [f"image-{length // 2}"]


def test_the_last_batch_may_be_empty():
    *_, last = load(MadeSource(6), BatchSchedule(3))
    assert last.number == 2
    assert not last.mask.any()
    assert not last.data.any()
    assert (len(last.positions), len(last.ids), len(last.labels)) == (0, 0, 0)


@pytest.mark.parametrize("workers", [1, 3, 8, 100])
def test_order_does_not_depend_on_workers(workers):
    source = MadeSource(50, broken=(7, 8, 49))
    assert_same(load(source, BatchSchedule(8), workers=workers), load(source, BatchSchedule(8)))


@pytest.mark.parametrize("done", range(5))
def test_parts_that_are_done_are_left_out(done):
    source = MadeSource(25, broken=(13,))
    everything = load(source, BatchSchedule(3, process=1, processes=2))
    assert [batch.number for batch in everything] == [1, 3, 5, 7]
    parts = frozenset([1, 3, 5, 7][:done])
    rest = load(source, BatchSchedule(3, process=1, processes=2, done=parts))
    assert_same(rest, everything[done:])


@pytest.mark.parametrize("worker_processes", [False, True])
def test_nothing_is_left(worker_processes):
    schedule = BatchSchedule(3, done=frozenset(range(9)))
    assert load(MadeSource(25), schedule, worker_processes=worker_processes) == []


class Counting:
    """Counts the reads of each image."""

    name = "counting"
    ignored = ()

    def __init__(self, length):
        self.reads = [0] * length

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, index):
        self.reads[index] += 1
        return Record(str(index), -1, grey_pixel(index))


def test_reads_only_what_is_wanted_and_not_far_ahead():
    source = Counting(100)
    schedule = BatchSchedule(5, done=frozenset([0, 1]))
    iterator = source_stream(source, ONE_PIXEL, Decoding(2)).batches(schedule)
    assert sum(source.reads) == 0
    next(iterator)
    iterator.close()
    assert source.reads[:10] == [0] * 10
    assert source.reads[10:15] == [1] * 5
    assert sum(source.reads) <= 5 + 2 * 5


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    iterator = source_stream(Counting(100), ONE_PIXEL, Decoding(2)).batches(BatchSchedule(5))
    next(iterator)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    iterator.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


class Unreadable(Counting):
    def __getitem__(self, index):
        if index == 12:
            raise PermissionError(13, "Permission denied", "12.png")
        return super().__getitem__(index)


def test_a_file_that_cannot_be_read_ends_the_run():
    iterator = source_stream(Unreadable(20), ONE_PIXEL, Decoding(2)).batches(BatchSchedule(5))
    assert [len(next(iterator).ids) for _ in range(2)] == [5, 5]
    with pytest.raises(PermissionError, match=r"Permission denied: '12\.png'"):
        next(iterator)


def test_there_is_a_worker():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Decoding(workers=0)


def test_workers_are_as_many_as_the_cpus_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6}, raising=False)
    assert available_cpus() == 3
    before = set(threading.enumerate())
    iterator = source_stream(Counting(100), ONE_PIXEL).batches(BatchSchedule(5))
    next(iterator)
    assert len(set(threading.enumerate()) - before) == 3
    iterator.close()


@pytest.mark.parametrize("worker_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_a_folder(tmp_path, worker_processes):
    rng = np.random.default_rng(0)
    for index in range(11):
        pixels = rng.integers(0, 256, (40, 30 + index, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    (tmp_path / "05.png").write_text("text")
    source = open_source(str(tmp_path))
    preprocess = PREPROCESSES["bit32"]
    schedule = BatchSchedule(4, done=frozenset([0]))
    found = load(source, schedule, preprocess, workers=3, worker_processes=worker_processes)
    assert [each.id for batch in found for each in batch.excluded] == ["05.png"]
    positions = np.concatenate([batch.positions for batch in found])
    np.testing.assert_array_equal(positions, [4, *range(6, 11)])
    pixels = np.concatenate([batch.data for batch in found])
    for position, row in enumerate(pixels, 4):
        if position in (5, 11):
            assert not row.any()
        else:
            np.testing.assert_array_equal(row, preprocess.pixels(decode_rgb(source[position].data)))


def test_nothing_is_printed(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    code = f"""
from gradnorm_jax.data import as_stream
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.schedule import BatchSchedule

(batch,) = as_stream({str(tmp_path)!r}, get_preprocess("bit32")).batches(BatchSchedule(2))
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_real_images(shared_data):
    source = open_source(f"csv:{shared_data}/imagenet/id_val.csv")
    preprocess = PREPROCESSES["crop224"]
    schedule = BatchSchedule(16, done=frozenset(range(3)))
    batch = next(source_stream(source, preprocess).batches(schedule))
    for row, position in enumerate(range(48, 64)):
        record = source[position]
        assert (batch.ids[row], batch.labels[row]) == (record.id, record.label)
        np.testing.assert_array_equal(batch.data[row], preprocess.pixels(decode_rgb(record.data)))
    assert batch.mask.all()
