import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.data import schedule
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation import step
from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
from gradnorm_jax.evaluation.output_cache import OutputCache, cached_stream
from gradnorm_jax.evaluation.records import ID, ScoredBatch, ScoreTable
from gradnorm_jax.evaluation.sinks import FolderSink
from gradnorm_jax.evaluation.storage import open_folder
from gradnorm_jax.types import Outputs
from tests.evaluation import networks
from tests.evaluation.networks import inputs, labels
from tests.evaluation.processes import read_files

LENGTH, BROKEN = 10, 3
VALUES = Outputs(
    *(np.random.default_rng(0).normal(size=(LENGTH, n)).astype(np.float32) for n in (5, 3))
)


def write(folder, dtype, rows, batches_per_part=2):
    """What a run keeps of ten inputs, of which the fourth is broken."""
    schedule = BatchSchedule(rows, batches_per_part)
    sink = FolderSink(folder, "made", schedule, OutputCache(folder, dtype))
    for number in schedule.taken(LENGTH):
        positions = np.arange(number * rows, min((number + 1) * rows, LENGTH))
        kept = positions[positions != BROKEN]
        mask = np.isin(np.arange(rows) + number * rows, kept)
        ends = ((0, rows - len(positions)), (0, 0))
        outputs = Outputs(*(jnp.asarray(np.pad(x[positions], ends)) for x in VALUES))
        excluded = [Excluded("image-3", "bad", 3)] if BROKEN in positions else []
        table = ScoreTable(
            kept,
            [f"image-{i}" for i in kept],
            kept.astype(np.int32) % 3,
            kept.astype(np.int32) % 2,
            {},
            excluded,
        )
        sink.write(ScoredBatch(number, mask, table, outputs if mask.any() else None))
    sink.finish()
    return schedule


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (4, 1), (16, 1), (2, 3), (3, 7), (5, 1)])
def test_every_row_comes_back_once(tmp_path, rows, processes):
    folder = open_folder(tmp_path)
    schedule = write(folder, "float32", rows)
    stream = cached_stream(folder, "made", schedule.part_size)
    assert stream.length == LENGTH
    seen, excluded = [], []
    for process in range(processes):
        share = dataclasses.replace(schedule, process=process, processes=processes)
        batches = list(stream.batches(share))
        assert [batch.number for batch in batches] == share.taken(LENGTH)
        for batch in batches:
            features, logits = batch.data
            at = np.flatnonzero(batch.mask)
            assert not len(at) or features.shape == (rows, 5)
            assert len(at) == len(batch.positions) == len(batch.ids)
            for row, position, name in zip(at, batch.positions, batch.ids, strict=True):
                assert name == f"image-{position}"
                np.testing.assert_array_equal(features[row], VALUES.features[position])
                np.testing.assert_array_equal(logits[row], VALUES.logits[position])
            np.testing.assert_array_equal(batch.labels, batch.positions % 3)
            seen += batch.positions.tolist()
            excluded += batch.excluded
    assert sorted(seen) == [i for i in range(LENGTH) if i != BROKEN]
    assert excluded == [Excluded("image-3", "bad", 3)]


def test_parts_that_are_done_are_not_read(tmp_path):
    folder = open_folder(tmp_path)
    schedule = write(folder, "float32", rows=2)
    stream = cached_stream(folder, "made", schedule.part_size)
    (tmp_path / "cache" / "made" / "000000.safetensors").unlink()
    rest = dataclasses.replace(schedule, done=frozenset([0]))
    assert [batch.number for batch in stream.batches(rest)] == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 10, 16])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_batches_need_not_be_those_of_the_run(tmp_path, rows, size):
    folder = open_folder(tmp_path)
    stream = cached_stream(folder, "made", write(folder, "float32", rows).part_size)
    batches = list(stream.batches(BatchSchedule(size)))
    kept = [i for i in range(LENGTH) if i != BROKEN]
    assert [i for batch in batches for i in batch.positions] == kept
    assert [i for batch in batches for i in batch.ids] == [f"image-{i}" for i in kept]
    assert [each.position for batch in batches for each in batch.excluded] == [BROKEN]
    logits = [batch.data.logits[batch.mask] for batch in batches if batch.mask.any()]
    np.testing.assert_array_equal(np.concatenate(logits), VALUES.logits[kept])


def test_a_cache_can_be_read_with_less_data_and_other_devices(tmp_path, monkeypatch):
    """Which makes batches of other sizes."""
    data = {"id_data": inputs(11), "ood_data": {"far": inputs(9, 1)}, "detectors": ["msp"]}
    fit = (inputs(100, 2), labels(100))
    expected = evaluate(networks.build(), **data, fit=fit, cache="float32", out=tmp_path)
    monkeypatch.setattr(step, "batch_mesh", lambda: networks.as_device_count(3))
    result = evaluate_cache(tmp_path, detectors=["msp"])
    for key, scores in expected.scores.items():
        np.testing.assert_allclose(result.scores[key], scores, rtol=1e-6)


def test_half_precision_rounds_to_nearest(tmp_path):
    folder = open_folder(tmp_path)
    schedule = write(folder, "bfloat16", rows=16, batches_per_part=1)
    (batch,) = cached_stream(folder, "made", 16).batches(schedule)
    features = batch.data.features[batch.mask]
    expected = np.delete(VALUES.features, BROKEN, axis=0)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(features, expected, rtol=2**-8)
    (path,) = (tmp_path / "cache" / "made").iterdir()
    assert path.stat().st_size < 9 * (5 + 3) * 2 + 300


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder of a run with a cache, and a function that starts it again."""
    monkeypatch.setattr(schedule, "PART_SIZE", 16)

    def run():
        return evaluate(
            networks.build(),
            (inputs(37), labels(37)),
            {"far": inputs(21, 1)},
            detectors=["msp"],
            fit=(inputs(45, 2), labels(45)),
            batch_size=8,
            cache="float32",
            out=tmp_path / "run",
        )

    run()
    return tmp_path / "run", run


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", ["ID", "fit"])
def test_a_damaged_part_is_named_and_made_again(cached, tmp_path, damage, name):
    folder, run = cached
    expected = read_files(folder)
    path = folder / "cache" / name / "000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + b"\xff")
    if damage == "gone":
        path.unlink()
    problem = "missing" if damage == "gone" else "damaged"
    options = {"detectors": ["msp", "mahalanobis"], "out": tmp_path / "out"}
    with pytest.raises(
        ValueError,
        match=rf"cache/{name}/000001\.safetensors is {problem}; run the command that wrote",
    ):
        evaluate_cache(folder, **options)
    run()
    assert read_files(folder) == expected
    assert list(evaluate_cache(folder, **options).metrics) == ["msp", "mahalanobis"]


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("cache/head.safetensors", FileNotFoundError, "holds no whole cache"),
        ("scores/far.parquet/000001.parquet", ValueError, "does not hold all of far; run the comm"),
        ("scores/ID.parquet/000000.parquet", ValueError, "does not hold all of ID"),
        ("config.json", FileNotFoundError, "holds no run with a cache"),
    ],
)
def test_a_cache_that_is_not_complete(cached, tmp_path, file, error, message):
    folder, _ = cached
    (folder / file).unlink()
    with pytest.raises(error, match=message):
        evaluate_cache(folder, detectors=["msp"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_head_is_named(cached):
    folder, run = cached
    expected = read_files(folder)
    (folder / "cache" / "head.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cache/head\.safetensors is damaged; run the command"):
        evaluate_cache(folder, detectors=["msp"])
    run()
    assert read_files(folder) == expected


def test_a_run_from_a_cache_resumes_and_is_known_by_it(cached, tmp_path):
    folder, _ = cached
    out, options = tmp_path / "out", {"detectors": ["msp", "gradnorm", "mahalanobis"]}
    first = evaluate_cache(folder, out=out, **options)
    files = read_files(out)
    (out / "scores" / "ID.parquet" / "000001.parquet").unlink()
    second = evaluate_cache(folder, out=out, **options)
    assert second.metrics == first.metrics
    assert read_files(out) == files
    with pytest.raises(FileExistsError, match=r"holds another run: detectors\.energy\.score is"):
        evaluate_cache(folder, out=out, detectors=["energy"])


def test_all_detectors_give_what_the_network_gives(cached):
    folder, _ = cached
    specs = ["msp", "mahalanobis", "energy", "gradnorm(include_bias=True)"]
    direct = evaluate(
        networks.build(),
        (inputs(37), labels(37)),
        {"far": inputs(21, 1)},
        detectors=specs,
        fit=(inputs(45, 2), labels(45)),
        batch_size=8,
    )
    kept = evaluate_cache(folder, detectors=[*specs, "odin(epsilon=0.01)", "gradnorm(select=all)"])
    assert list(kept.not_run) == ["odin(epsilon=0.01)", "gradnorm(select=all)"]
    assert kept.accuracy == direct.accuracy
    for spec, name in itertools.product(specs, (ID, "far")):
        np.testing.assert_allclose(
            kept.scores[spec, name], direct.scores[spec, name], rtol=1e-6, err_msg=spec
        )
    assert kept.metrics == direct.metrics


def test_without_training_data_in_the_cache(tmp_path):
    evaluate(
        networks.build(),
        inputs(9),
        {"far": inputs(5)},
        detectors=["msp"],
        cache="bfloat16",
        out=tmp_path,
    )
    result = evaluate_cache(tmp_path, detectors=["mahalanobis", "msp"])
    assert list(result.not_run) == ["mahalanobis"]
    with pytest.raises(ValueError, match="none of the detectors can be run: odin"):
        evaluate_cache(tmp_path, detectors=["odin(epsilon=0.1)"])
