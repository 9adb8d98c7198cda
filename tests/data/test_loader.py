import io
import itertools
import os
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.data.images import decode_rgb
from gradnorm_jax.data.loader import available_cpus, batches
from gradnorm_jax.data.preprocess import PREPROCESSES, Preprocess, centre_crop
from gradnorm_jax.data.sources import Record, open_source
from gradnorm_jax.data.split import Split
from gradnorm_jax.evaluation.scoring import Scored, image_feed, no_progress, run_steps
from gradnorm_jax.sharding import batch_mesh


def first_pixel(image):
    return centre_crop(image, 1)


ONE_PIXEL = Preprocess("one_pixel", 1, first_pixel, (0, 0, 0), (1, 1, 1))


def encode(value):
    file = io.BytesIO()
    Image.new("L", (1, 1), value).save(file, "PPM")
    return file.getvalue()


class MadeSource(NamedTuple):
    """Image i is one pixel of grey i with label i % 3; those in `broken` are text."""

    length: int
    broken: tuple[int, ...] = ()
    name: str = "made"
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        data = b"text" if index in self.broken else encode(index)
        return Record(f"image-{index}", index % 3, data)


def load(source, split, **options):
    return list(batches(source, ONE_PIXEL, split, **{"workers": 2, **options}))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_by_hand():
    first, last = load(MadeSource(5, broken=(1,)), Split(3))
    np.testing.assert_array_equal(first.pixels[:, 0, 0], [[0] * 3, [0] * 3, [2] * 3])
    np.testing.assert_array_equal(first.mask, [True, False, True])
    np.testing.assert_array_equal(first.positions, [0, 1, 2])
    np.testing.assert_array_equal(first.labels, [0, 1, 2])
    assert first.ids == ("image-0", "image-1", "image-2")
    ((bad, reason),) = first.bad
    assert bad == "image-1"
    assert reason.startswith("the file is not an image")
    np.testing.assert_array_equal(last.pixels[:, 0, 0], [[3] * 3, [4] * 3, [0] * 3])
    np.testing.assert_array_equal(last.mask, [True, True, False])
    np.testing.assert_array_equal(last.positions, [3, 4, -1])
    np.testing.assert_array_equal(last.labels, [0, 1, -1])
    assert last.ids == ("image-3", "image-4", "")
    assert last.bad == ()
    dtypes = [last.pixels.dtype, last.labels.dtype, last.positions.dtype, last.mask.dtype]
    assert dtypes == [np.uint8, np.int32, np.int64, np.bool_]


@pytest.mark.parametrize("process_count", range(1, 6))
def test_every_image_once_over_all_hosts(process_count):
    for length, batch_size in itertools.product(range(1, 21), range(1, 9)):
        source = MadeSource(length, broken=(length // 2,))
        splits = [Split(batch_size, i, process_count) for i in range(process_count)]
        hosts = [load(source, split, workers=1) for split in splits]
        steps = splits[0].num_steps(length)
        assert [len(host) for host in hosts] == [steps] * process_count
        # Step by step, host by host: the source's order, then padding and nothing else.
        rows = [host[step] for step in range(steps) for host in hosts]
        assert all(len(batch.pixels) == batch_size for batch in rows)
        positions = np.concatenate([batch.positions for batch in rows])
        np.testing.assert_array_equal(positions[:length], np.arange(length))
        firsts = [split.first(step) for step in range(steps) for split in splits]
        np.testing.assert_array_equal(firsts, np.arange(len(positions))[::batch_size])
        assert (positions[length:] == -1).all()
        assert len(positions) - length < process_count * batch_size
        mask = np.concatenate([batch.mask for batch in rows])
        expected = np.arange(len(positions)) < length
        expected[length // 2] = False
        np.testing.assert_array_equal(mask, expected)
        pixels = np.concatenate([batch.pixels for batch in rows])[:, 0, 0, 0]
        np.testing.assert_array_equal(pixels, np.where(mask, positions, 0))
        assert [bad for batch in rows for bad, _ in batch.bad] == [f"image-{length // 2}"]


@pytest.mark.parametrize(
    ("length", "batch_size", "process_count", "expected"),
    [(0, 4, 1, 0), (1, 4, 1, 1), (4, 4, 1, 1), (5, 4, 1, 2), (8, 4, 2, 1), (9, 4, 2, 2)],
)
def test_num_steps_by_hand(length, batch_size, process_count, expected):
    assert Split(batch_size, 0, process_count).num_steps(length) == expected


@pytest.mark.parametrize("split", [(0,), (1, 0, 0), (1, -1, 2), (1, 2, 2)])
def test_splits_that_cannot_be(split):
    with pytest.raises(ValueError, match=r"Split\(rows=.* cannot be: rows must be at least 1, and"):
        Split(*split)


@pytest.mark.parametrize("workers", [1, 3, 8, 100])
def test_order_does_not_depend_on_workers(workers):
    source = MadeSource(50, broken=(7, 8, 49))
    assert_same(load(source, Split(8), workers=workers), load(source, Split(8)))


@pytest.mark.parametrize("start", range(5))
def test_resumes_at_a_batch(start):
    source = MadeSource(25, broken=(13,))
    split = Split(3, process=1, processes=2)
    everything = load(source, split)
    assert len(everything) == 5
    assert_same(load(source, split, start=start), everything[start:])
    for worker_processes in (False, True):
        assert load(source, split, start=5, worker_processes=worker_processes) == []


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
        return Record(str(index), -1, encode(index))


def test_reads_only_what_is_wanted_and_not_far_ahead():
    source = Counting(100)
    iterator = batches(source, ONE_PIXEL, Split(5), workers=2, start=2)
    assert sum(source.reads) == 0
    next(iterator)
    iterator.close()
    assert source.reads[:10] == [0] * 10
    assert source.reads[10:15] == [1] * 5
    assert sum(source.reads) <= 5 + 2 * 5


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    iterator = batches(Counting(100), ONE_PIXEL, Split(5), workers=2)
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
    iterator = batches(Unreadable(20), ONE_PIXEL, Split(5), workers=2)
    assert [len(next(iterator).ids) for _ in range(2)] == [5, 5]
    with pytest.raises(PermissionError, match=r"Permission denied: '12\.png'"):
        next(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"start": 4}, "start must be from 0 to 3, got 4"),
        ({"start": -1}, "start must be from 0 to 3, got -1"),
    ],
)
def test_arguments_are_checked_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        batches(MadeSource(9), ONE_PIXEL, Split(3), **options)


def test_workers_are_as_many_as_the_cpus_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6}, raising=False)
    assert available_cpus() == 3
    before = threading.active_count()
    iterator = batches(Counting(100), ONE_PIXEL, Split(5))
    next(iterator)
    assert threading.active_count() == before + 3
    iterator.close()


class Announcing(Counting):
    """Tells of each step of 8 images that reading it has begun."""

    begun = tuple(threading.Event() for _ in range(12))

    def __getitem__(self, index):
        self.begun[index // 8].set()
        return super().__getitem__(index)


def test_decoding_goes_on_while_a_step_is_computed():
    """No step is done before the next is being read: one after the other, that would never end."""

    def score(model, states, pixels, *, detectors, mesh):
        following = Announcing.begun[int(pixels[0, 0, 0, 0]) // 8 + 1 :][:1]
        assert all(begun.wait(timeout=60) for begun in following)
        return Scored(pixels[:, 0, 0, 0], {}, None)

    feed = image_feed("slow", Announcing(96), ONE_PIXEL, workers=1)._replace(score=score)
    steps = run_steps(
        feed, None, {}, detectors=(), mesh=batch_mesh(), split=Split(8), track=no_progress
    )
    predictions = np.concatenate([step.table.predictions for step in steps])
    np.testing.assert_array_equal(predictions, np.arange(96))


@pytest.mark.parametrize("worker_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_a_folder(tmp_path, worker_processes):
    rng = np.random.default_rng(0)
    for index in range(11):
        pixels = rng.integers(0, 256, (40, 30 + index, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    (tmp_path / "05.png").write_text("text")
    source = open_source(str(tmp_path))
    preprocess = PREPROCESSES["bit32"]
    options = {"start": 1, "workers": 3, "worker_processes": worker_processes}
    found = list(batches(source, preprocess, Split(4), **options))
    assert [bad for batch in found for bad, _ in batch.bad] == ["05.png"]
    positions = np.concatenate([batch.positions for batch in found])
    np.testing.assert_array_equal(positions, [*range(4, 11), -1])
    pixels = np.concatenate([batch.pixels for batch in found])
    for position, row in zip(positions, pixels, strict=True):
        if position in (-1, 5):
            assert not row.any()
        else:
            np.testing.assert_array_equal(row, preprocess.pixels(decode_rgb(source[position].data)))


def test_nothing_is_printed(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    code = f"""
from gradnorm_jax.data.loader import batches
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.sources import open_source
from gradnorm_jax.data.split import Split

(batch,) = batches(open_source({str(tmp_path)!r}), get_preprocess("bit32"), Split(2))
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_real_images(shared_data):
    source = open_source(f"csv:{shared_data}/imagenet/id_val.csv")
    preprocess = PREPROCESSES["crop224"]
    batch = next(batches(source, preprocess, Split(16), start=3))
    for row, position in enumerate(range(48, 64)):
        record = source[position]
        assert (batch.ids[row], batch.labels[row]) == (record.id, record.label)
        np.testing.assert_array_equal(batch.pixels[row], preprocess.pixels(decode_rgb(record.data)))
    assert batch.mask.all()
