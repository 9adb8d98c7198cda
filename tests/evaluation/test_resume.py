"""Runs in a folder that are interrupted, shared or damaged, and come out the same."""

import contextlib
import dataclasses
import itertools
import platform
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from gradnorm_jax.data import as_stream, schedule
from gradnorm_jax.evaluation import sinks
from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
from gradnorm_jax.evaluation.records import FIT, ID, Interrupted, Unfinished
from tests.evaluation import networks
from tests.evaluation.networks import inputs, labels, ragged
from tests.evaluation.processes import read_files

DETECTORS = ("msp", "mahalanobis", "gradnorm")
COUNTS = {FIT: 45, ID: 37, "far": 21}
"""Of 8 inputs a batch and 2 batches a part there are 6, 5 and 3 batches, and 3, 3 and 2 parts."""
BATCHES = [(FIT, 6), (ID, 5), ("far", 3)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(schedule, "PART_SIZE", 16)
    monkeypatch.setattr(sinks, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sinks, "SAVE_SECONDS", -1.0)


@pytest.fixture(scope="module")
def model():
    return networks.build()


class LoaderError(Exception):
    """What the user's own loader raises."""


class Reading:
    """The data sets, and which of their batches have been read; reading may fail or be stopped."""

    def __init__(self, *, as_loaders=False, fail_at=None, stop_at=None):
        self.read, self._calls = [], 0
        self._fail_at, self._stop_at = fail_at, stop_at
        self.streams = {name: self._stream(name, as_loaders) for name in COUNTS}

    def _stream(self, name, as_loaders):
        columns = inputs(COUNTS[name], len(name)), labels(COUNTS[name])
        data = (lambda: ragged(*columns)) if as_loaders else columns
        stream = as_stream(data, name=name)

        def batches(schedule):
            for batch in stream.batches(schedule):
                if len(self.read) == self._fail_at:
                    raise LoaderError
                self.read.append((name, batch.number))
                yield batch

        return dataclasses.replace(stream, batches=batches)

    def should_stop(self):
        self._calls += 1
        return self._calls == self._stop_at


def run(model, out, reading=None, **options):
    reading = reading or Reading()
    return evaluate(
        model,
        reading.streams[ID],
        {"far": reading.streams["far"]},
        **{"detectors": DETECTORS, "fit": reading.streams[FIT], "batch_size": 8, **options},
        out=out,
        should_stop=reading.should_stop,
    )


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Folders of undisturbed runs: without a cache, with one, and of loaders."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "PART_SIZE", 16)
        run(model, root / "plain")
        run(model, root / "cache", cache="float32")
        run(model, root / "loaders", Reading(as_loaders=True))
    return root


def test_the_files_of_a_run(whole):
    parts = {"fit": 3, "ID": 3, "far": 2}
    rows = [f"scores/{n}.parquet/{i:06}.parquet" for n, k in parts.items() for i in range(k)]
    outputs = [f"cache/{n}/{i:06}.safetensors" for n, k in parts.items() for i in range(k)]
    rest = ["histograms.png", "metrics.json", "report.md", "statistics/00000-of-00001.safetensors"]
    assert sorted(read_files(whole / "plain")) == sorted(rows + rest)
    assert sorted(read_files(whole / "cache")) == sorted(
        [*rows, *outputs, *rest, "cache/head.safetensors"]
    )
    plain, loaders = (read_files(whole / name) for name in ("plain", "loaders"))
    assert plain == loaders


def all_batches():
    return [(name, i) for name, count in BATCHES for i in range(count)]


MOMENTS = [
    *itertools.product(["plain"], range(1, 14)),
    *itertools.product(["cache", "loaders"], (1, 5, 8, 12)),
]


@pytest.mark.parametrize(("kind", "moment"), MOMENTS)
@pytest.mark.parametrize("how", ["stopped", "broken"])
def test_an_interrupted_run_resumes(model, whole, tmp_path, kind, moment, how):
    as_loaders = kind == "loaders"
    options = {"cache": "float32"} if kind == "cache" else {}
    if how == "stopped":
        with pytest.raises(Interrupted, match="stopped; run the same command again to resume"):
            run(model, tmp_path, Reading(as_loaders=as_loaders, stop_at=moment), **options)
    else:
        with pytest.raises(LoaderError):
            run(model, tmp_path, Reading(as_loaders=as_loaders, fail_at=moment), **options)
    assert not (tmp_path / "metrics.json").exists()
    done = {
        (path.parent.name.removesuffix(".parquet"), int(path.stem))
        for path in tmp_path.glob("scores/*/*")
    }
    again = Reading(as_loaders=as_loaders)
    run(model, tmp_path, again, **options)
    assert again.read == [(name, i) for name, i in all_batches() if (name, i // 2) not in done]
    assert len(again.read) >= 14 - moment
    assert len(again.read) <= 14 - moment + 3
    assert read_files(tmp_path) == read_files(whole / kind)


def test_a_finished_run_reads_nothing_again(model, whole, tmp_path):
    first = run(model, tmp_path)
    files, times = read_files(tmp_path), part_times(tmp_path)
    again = Reading()
    second = run(model, tmp_path, again)
    assert again.read == []
    assert second.metrics == first.metrics
    for key, scores in first.scores.items():
        np.testing.assert_array_equal(second.scores[key], scores)
    assert read_files(tmp_path) == files
    assert part_times(tmp_path) == times


def part_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("scores/*/*")}


def test_statistics_are_saved_now_and_then(model, whole, tmp_path, monkeypatch):
    """A save after the second part, when more than a minute has passed."""
    clock = itertools.count(time.monotonic(), 70.0)
    monkeypatch.setattr(sinks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sinks, "SAVE_SECONDS", 60.0)
    with pytest.raises(LoaderError):
        run(model, tmp_path, Reading(fail_at=5))
    again = Reading()
    run(model, tmp_path, again)
    assert again.read[0] == (FIT, 4)
    assert read_files(tmp_path) == read_files(whole / "plain")


OTHER = {
    "weights": ({"model": networks.build(seed=1)}, "weights_sha256 is '"),
    "data": ({"id_data": (inputs(37, 9), labels(37))}, "the data of ID are others"),
    "labels": ({"id_data": (inputs(37, 2), labels(37)[::-1])}, "the data of ID are others"),
    "number": ({"ood_data": {"far": inputs(20)}}, "data.far.inputs is 21 there and 20 now"),
    "sets": ({"ood_data": {"near": inputs(20)}}, "data.near.inputs is None there and 20 now"),
    "loader": ({"fit": [inputs(45)]}, "data.fit.stream is None there and 'fit' now"),
    "no fit": ({"fit": None}, "data.fit.inputs is 45 there and missing now"),
    "name": ({"name": "mine"}, "model is None there and 'mine' now"),
    "option": (
        {"detectors": ["msp", "gradnorm(ord=2)"]},
        r"detectors\.gradnorm\(ord=2\)\.score is None there",
    ),
    "fewer": ({"detectors": ["msp", "mahalanobis"]}, r"detectors\.gradnorm\.score is .* missing"),
    "batch size": ({"batch_size": 16}, "batch_size is 8 there and 16 now"),
    "offset": ({"label_offset": 1}, "label_offset is 0 there and 1 now"),
    "cache": ({"cache": "float32"}, "cache is None there and 'float32' now"),
    "processes": ({"process": (0, 2)}, "processes is 1 there and 2 now"),
    "preprocess": ({"preprocess": networks.PREPROCESS}, "preprocess.* None there and"),
    "function": ({"preprocess": np.negative}, "preprocess.* None there and '.*negative' now"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_refused_by_what_differs(model, whole, what):
    changes, message = OTHER[what]
    streams = Reading().streams
    arguments = {
        "model": model,
        "id_data": streams[ID],
        "ood_data": {"far": streams["far"]},
        "fit": streams[FIT],
        "detectors": DETECTORS,
        "batch_size": 8,
        **changes,
    }
    files = read_files(whole / "plain")
    with pytest.raises(FileExistsError, match=rf"plain holds another run: .*{message}") as error:
        evaluate(**arguments, out=whole / "plain", wait_seconds=0)
    assert "run its own command again to resume it, or choose another --out" in str(error.value)
    assert read_files(whole / "plain") == files


def test_another_version_is_refused(model, whole, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    with pytest.raises(FileExistsError, match=r"versions.python is '3\..*' there and '3.99.0' now"):
        run(model, whole / "plain")


def test_a_preprocess_of_the_same_name_is_another(tmp_path, model):
    data = {"id_data": networks.images(9), "ood_data": {"far": networks.images(5)}}
    options = {"detectors": ["msp"], "out": tmp_path}
    evaluate(model, **data, **options, preprocess=networks.PREPROCESS)
    other = dataclasses.replace(networks.PREPROCESS, mean=(0.4, 0.5, 0.5))
    with pytest.raises(FileExistsError, match=r"preprocess\.mean is \[0.5, .* and \[0.4, 0.5, 0.5"):
        evaluate(model, **data, **options, preprocess=other)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("fit", [False, True])
def test_processes_one_after_another(model, whole, tmp_path, order, fit):
    detectors = DETECTORS if fit else ("msp", "gradnorm")
    options = {"detectors": detectors, "wait_seconds": 0} | ({} if fit else {"fit": None})
    outcomes, read = [], []
    for process in [*order, *(order if fit else ())]:
        reading = Reading()
        try:
            result = run(model, tmp_path, reading, process=(process, 3), **options)
            outcomes.append("result")
        except (Unfinished, Interrupted) as error:
            outcomes.append(str(error))
        read += reading.read
        if outcomes[-1] == "result":
            break
    waiting = [
        f"process {i} of 3 has not finished fitting" for i in ((1, 2) if order[0] == 0 else (0, 0))
    ]
    done = [f"process {i} of 3 has done its share" for i in (*order, *order)]
    expected = [*waiting, *done[2:4], "result"] if fit else [*done[:2], "result"]
    assert [x[: len(y)] for x, y in zip(outcomes, expected, strict=True)] == expected
    assert sorted(read) == sorted(x for x in all_batches() if fit or x[0] != FIT)
    assert_same_results(tmp_path, result, whole, fit)


def assert_same_results(folder, result, whole, fit):
    """Each input once, and the scores and the table of a single process."""
    files, expected = read_files(folder), read_files(whole / "plain")
    names = {n for n in expected if n.startswith("scores/") and (fit or "/fit" not in n)}
    assert {n for n in files if n.startswith("scores/")} == names
    for name in (ID, "far"):
        assert list(result.tables[name].ids) == [str(i) for i in range(COUNTS[name])]
    if fit:
        assert {n for n in files if n.startswith("statistics/")} == {
            f"statistics/{i:05}-of-00003.safetensors" for i in range(3)
        }
        assert files["report.md"] == expected["report.md"]
        assert files["metrics.json"] == expected["metrics.json"]


@pytest.mark.parametrize("as_loaders", [False, True])
def test_processes_at_the_same_time(model, whole, tmp_path, as_loaders):
    outcomes = {}

    def take_part(process):
        reading = Reading(as_loaders=as_loaders)
        try:
            outcomes[process] = run(model, tmp_path, reading, process=(process, 3), wait_seconds=60)
        except Unfinished as error:
            outcomes[process] = error

    threads = [threading.Thread(target=take_part, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [x for x in outcomes.values() if not isinstance(x, Unfinished)]
    assert len(outcomes) == 3
    assert results
    for result in results:
        assert_same_results(tmp_path, result, whole, fit=True)


def test_more_processes_than_parts(model, whole, tmp_path):
    for process in [*range(7)] * 2:
        try:
            result = run(model, tmp_path, process=(process, 7), wait_seconds=0)
        except (Unfinished, Interrupted):
            continue
        break
    assert list(result.tables[ID].ids) == [str(i) for i in range(37)]
    assert read_files(tmp_path)["metrics.json"] == read_files(whole / "plain")["metrics.json"]


def test_processes_wait_for_each_other_and_not_for_ever(model, tmp_path):
    with pytest.raises(Interrupted, match="process 1 of 2 has not finished fitting; run the same"):
        run(model, tmp_path, process=(0, 2), wait_seconds=0.05)
    reading = Reading(stop_at=1)
    with pytest.raises(Interrupted, match="process 1 of 2 has not finished fitting"):
        run(model, tmp_path, reading, process=(0, 2), wait_seconds=3600)
    assert reading.read == []


def damage(path, how):
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        # Within the first column's values, or the header.
        "flipped": content[:40] + bytes([content[40] ^ 1]) + content[41:],
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
@pytest.mark.parametrize(
    "file",
    [
        "scores/ID.parquet/000001.parquet",
        "scores/far.parquet/000001.parquet",
        "scores/fit.parquet/000000.parquet",
    ],
)
def test_damaged_rows_are_named_and_made_again(model, whole, tmp_path, file, how, caplog):
    run(model, tmp_path)
    damage(tmp_path / file, how)
    run(model, tmp_path)
    (record,) = caplog.records
    assert record.message.startswith(f"{tmp_path / file} is damaged (")
    assert record.message.endswith("; now it is written again")
    assert read_files(tmp_path) == read_files(whole / "plain")


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_damaged_statistics_are_named_and_made_again(model, whole, tmp_path, how, caplog):
    run(model, tmp_path)
    path = tmp_path / "statistics" / "00000-of-00001.safetensors"
    damage(path, how)
    run(model, tmp_path)
    (record,) = caplog.records
    assert record.message.startswith(f"{path} is damaged (")
    assert record.message.endswith("; now it is written again")
    assert read_files(tmp_path) == read_files(whole / "plain")


def test_damaged_statistics_of_another_process_are_not_there_yet(model, tmp_path):
    with pytest.raises(Interrupted):
        run(model, tmp_path, process=(0, 2), wait_seconds=0)
    with contextlib.suppress(Unfinished):
        run(model, tmp_path, process=(1, 2), wait_seconds=0)
    damage(tmp_path / "statistics" / "00001-of-00002.safetensors", "flipped")
    with pytest.raises(Interrupted, match="process 1 of 2 has not finished fitting"):
        run(model, tmp_path, process=(0, 2), wait_seconds=0)
    with contextlib.suppress(Unfinished):
        run(model, tmp_path, process=(1, 2), wait_seconds=0)
    assert run(model, tmp_path, process=(0, 2), wait_seconds=0)["mahalanobis", "far"]


@pytest.mark.parametrize("kind", ["cache", "loaders"])
def test_any_file_that_is_gone_is_made_again(model, whole, tmp_path, kind):
    options = {"cache": "float32"} if kind == "cache" else {}
    run(model, tmp_path, Reading(as_loaders=kind == "loaders"), **options)
    expected = read_files(whole / kind)
    names = [
        name for name in expected if not re.search(r"(fit|ID|far).*/000001|/(fit|ID).*02", name)
    ]
    for name in names:
        (tmp_path / name).unlink()
        reading = Reading(as_loaders=kind == "loaders")
        run(model, tmp_path, reading, **options)
        assert read_files(tmp_path) == expected, name
        if name.startswith(("scores/ID", "cache/far")):
            assert 1 <= len(reading.read) <= 2, name


def test_a_part_that_is_not_full_is_noticed(model, tmp_path):
    run(model, tmp_path)
    parts = tmp_path / "scores" / "ID.parquet"
    (parts / "000000.parquet").write_bytes((parts / "000002.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"000000\.parquet does not hold the 16 inputs that it sh"):
        run(model, tmp_path)


def test_a_damaged_config(model, tmp_path):
    run(model, tmp_path)
    for content in ("", "{}", "[]", '{"versions": 1}', "not json"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is not that of a run"):
            run(model, tmp_path)
        with pytest.raises(ValueError, match=r"config\.json is not that of a run"):
            evaluate_cache(tmp_path)


def test_foreign_files_are_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="already exists and is not empty; choose another"):
        run(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_came_to_nothing_leaves_nothing(model, tmp_path):
    with pytest.raises(LoaderError):
        run(model, tmp_path / "run", Reading(fail_at=0))
    assert not list((tmp_path / "run").iterdir())
