import dataclasses
import json
import platform

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from gradnorm_jax.data.split import Split
from gradnorm_jax.evaluation.cache import Cache, cached_feed
from gradnorm_jax.evaluation.folder import open_folder
from gradnorm_jax.evaluation.run import EvaluateOptions, run
from gradnorm_jax.evaluation.table import Excluded, ScoreTable
from gradnorm_jax.types import Outputs

KEPT = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9])
TABLE = ScoreTable(
    KEPT, [f"image-{i}" for i in KEPT], KEPT % 3, KEPT % 2, {}, [Excluded("image-3", "bad", 3)]
)
VALUES = Outputs(
    *(np.random.default_rng(0).normal(size=(10, n)).astype(np.float32) for n in (5, 3))
)


def write(folder, dtype, rows=4):
    keep = Cache(folder, dtype).writer("made", 10, Split(rows, 0, 1))
    for first in range(0, 10, rows):
        ends = ((0, max(0, first + rows - 10)), (0, 0))
        part = Outputs(*(jnp.asarray(np.pad(x[first : first + rows], ends)) for x in VALUES))
        keep(first, part)()


@pytest.mark.parametrize("address", ["{}", "memory://cache-{}"])
@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (4, 1), (16, 1), (2, 3), (3, 7)])
def test_every_row_comes_back_once(tmp_path, address, rows, processes):
    folder = open_folder(address.format(tmp_path))
    write(folder, "float32")
    feed = cached_feed(folder, "made", 10, TABLE)
    seen, excluded = {}, []
    for process in range(processes):
        split = Split(rows, process, processes)
        chunks = list(feed.chunks(split, 0))
        assert len(chunks) == split.num_steps(10)
        for chunk in chunks:
            (features, logits), predictions = chunk.data
            assert features.shape == (rows, 5)
            at = np.flatnonzero(chunk.mask)
            for row, position, name in zip(at, chunk.positions, chunk.ids, strict=True):
                assert name == f"image-{position}"
                assert predictions[row] == position % 2
                np.testing.assert_array_equal(features[row], VALUES.features[position])
                np.testing.assert_array_equal(logits[row], VALUES.logits[position])
                seen[position] = seen.get(position, 0) + 1
            excluded += chunk.excluded
    assert seen == dict.fromkeys(KEPT, 1)
    assert excluded == [Excluded("image-3", "bad", 3)]


def test_reading_can_start_at_any_step(tmp_path):
    folder = open_folder(tmp_path)
    write(folder, "float32")
    feed = cached_feed(folder, "made", 10, TABLE)
    (last,) = feed.chunks(Split(4, 0, 1), 2)
    assert last.ids == ["image-8", "image-9"]
    assert not list(feed.chunks(Split(4, 0, 1), 3))


def test_half_precision_rounds_to_nearest(tmp_path):
    folder = open_folder(tmp_path)
    write(folder, "bfloat16")
    (chunk,) = cached_feed(folder, "made", 10, TABLE).chunks(Split(10, 0, 1), 0)
    features = chunk.data[0].features
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, VALUES.features.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(features, VALUES.features, rtol=2**-8)
    size = sum(path.stat().st_size for path in tmp_path.rglob("c/0/0"))
    assert size == 4 * (5 + 3) * 2 + 2 * 4  # two chunks of four rows, each with its checksum


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    folder = open_folder(tmp_path)
    write(folder, "float32")
    path = tmp_path / "cache" / "made" / "features" / "c" / "1" / "0"
    content = path.read_bytes()
    path.write_bytes(content[:-9] if damage == "truncated" else b"\xff" + content[1:])
    if damage == "gone":
        path.unlink()
    with pytest.raises(
        OSError,
        match=r"cache/made cannot be read: .*features/c/1/0.*; if a file is damaged, delete it; "
        r"the run that wrote it, started again, mends that$",
    ):
        list(cached_feed(folder, "made", 10, TABLE).chunks(Split(4, 0, 1), 0))


def test_zeros_are_kept_like_all_else(tmp_path):
    folder = open_folder(tmp_path)
    split = Split(4, 0, 1)
    keep = Cache(folder, "float32").writer("made", 4, split)
    keep(0, Outputs(jnp.zeros((4, 5)), jnp.zeros((4, 3))))()
    excluded = [Excluded(f"image-{i}", "bad", i) for i in range(4)]
    table = ScoreTable(*(x[:0] for x in TABLE[:4]), {}, excluded)
    (chunk,) = cached_feed(folder, "made", 4, table).chunks(split, 0)
    assert chunk.excluded == excluded
    assert not chunk.data[0].features.any()


def test_steps_are_counted_up_to_the_first_lost_file(tmp_path):
    folder = open_folder(tmp_path)
    write(folder, "float32", rows=2)
    cache = Cache(folder, "float32")
    place = tmp_path / "cache" / "made"

    def count():
        return [cache.count_steps("made", 10, Split(2, process, 2)) for process in (0, 1)]

    assert count() == [3, 3]  # the last step of the second process has no rows
    for file, counts in {
        "logits/c/3/0": [3, 1],
        "features/c/4/0": [2, 1],
        "logits/zarr.json": [0, 0],
    }.items():
        (place / file).unlink()
        assert count() == counts


@pytest.fixture(scope="module")
def options(make_folder, weights, tmp_path_factory):
    return EvaluateOptions(
        model="bit_tiny",
        weights=weights,
        id=str(make_folder(13, classes=3)),
        ood=(f"far={make_folder(9, seed=2)}",),
        fit=str(make_folder(24, classes=3, seed=3)),
        out=tmp_path_factory.mktemp("run") / "out",
        detectors=("msp",),
        cache="float32",
        batch_size=8,
    )


@pytest.fixture(scope="module")
def cached(options):
    """The folder of a run with a cache, which had no use for the training images but kept them."""
    run(options)
    return options.out


def test_all_detectors_of_outputs_run_from_the_cache(cached, options, tmp_path):
    specs = ("msp", "odin", "mahalanobis", "energy", "gradnorm(include_bias=True)")
    direct = run(dataclasses.replace(options, detectors=specs, cache=None, out=tmp_path / "direct"))
    network = "odin(epsilon=0.01)"
    kept = run(
        EvaluateOptions(
            from_cache=cached, out=tmp_path / "kept", detectors=(*specs, network), batch_size=5
        )
    )
    assert "runs the network" in kept.not_run[network]
    assert kept.accuracy == direct.accuracy
    assert list(kept.metrics) == list(specs)
    for name, table in direct.tables.items():
        assert kept.tables[name].ids == table.ids
        np.testing.assert_array_equal(kept.tables[name].predictions, table.predictions)
        for spec, scores in table.scores.items():
            np.testing.assert_allclose(kept.tables[name].scores[spec], scores, rtol=1e-5)
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config["cache"] == json.loads((cached / "config.json").read_text())


def test_a_lost_chunk_is_noticed_and_mended(cached, options, tmp_path):
    expected = {p: p.read_bytes() for p in cached.rglob("*") if p.is_file()}
    from_cache = EvaluateOptions(from_cache=cached, out=tmp_path / "out", detectors=("msp",))
    for name in ("ID", "fit"):
        (cached / "cache" / name / "features" / "c" / "1" / "0").unlink()
    with pytest.raises(OSError, match=r"cache/ID cannot be read: .*c/1/0.* is missing; if a file"):
        run(from_cache)
    assert not list((tmp_path / "out").iterdir())
    run(options)
    assert {p: p.read_bytes() for p in cached.rglob("*") if p.is_file()} == expected
    run(from_cache)


def test_the_cache_tells_what_the_run_told(make_folder, options, tmp_path):
    folder = make_folder(5, seed=4)
    (folder / "notes.txt").write_text("ignored")
    (folder / "001.png").write_text("not an image")
    direct = dataclasses.replace(
        options,
        id=str(folder),
        ood=(f"near={folder}",),
        fit=None,
        max_bad=1,
        out=tmp_path / "direct",
    )
    run(direct)
    run(EvaluateOptions(from_cache=direct.out, out=tmp_path / "kept", detectors=("msp",)))
    reports = [(tmp_path / name / "report.md").read_text() for name in ("direct", "kept")]
    assert (
        "near: 2 files were excluded: notes.txt (not an image by its name); 001.png" in reports[0]
    )
    figures = [json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("direct", "kept")]
    first, second = figures[0]["excluded"]["near"]
    assert first == {"id": "notes.txt", "reason": "not an image by its name"}
    assert (second["id"], second["position"]) == ("001.png", 1)
    assert figures[0] == figures[1]
    assert reports[0] == reports[1]


def test_versions_other_than_the_caches_are_told(cached, tmp_path, monkeypatch, caplog):
    from_cache = EvaluateOptions(from_cache=cached, out=tmp_path / "out", detectors=("msp",))
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    run(from_cache)
    (record,) = caplog.records
    version = json.loads((cached / "config.json").read_text())["versions"]["python"]
    assert "made with other versions" in record.message
    assert record.message.endswith(f": python is '{version}' there and '3.99.0' now")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [x["versions"]["python"] for x in (config, config["cache"])] == ["3.99.0", version]


def test_a_row_per_image_of_each_set(cached):
    for name, count in {"ID": 13, "far": 9, "fit": 24}.items():
        table = pyarrow.parquet.read_table(cached / "scores" / f"{name}.parquet")
        assert table["position"].to_pylist() == list(range(count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mobilenet_v2"}, "options.model is 'bit_tiny' there and 'mobilenet_v2' now"),
        ({"preprocess": "crop224"}, "options.preprocess is 'bit32' there and 'crop224' now"),
        ({"id": "{far}"}, "sources.ID.images is 13 there and 9 now"),
        ({"ood": ("near={far}",)}, "sources.near.images is None there and 9 now"),
        ({"weights": "{config}"}, "weights_sha256 is "),
        ({"cache": "float32"}, "give only one of them"),
        ({"from_cache": "{far}"}, "holds no run"),
    ],
)
def test_a_cache_of_something_else_is_refused(cached, options, tmp_path, changes, message):
    paths = {"far": options.ood[0].removeprefix("far="), "config": cached / "config.json"}
    changes = {
        key: tuple(v.format(**paths) for v in value)
        if isinstance(value, tuple)
        else value.format(**paths)
        for key, value in changes.items()
    }
    with pytest.raises((ValueError, OSError), match=message):
        run(EvaluateOptions(**{"from_cache": cached, "out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_the_same_inputs_are_accepted(cached, options, tmp_path):
    again = dataclasses.replace(
        options, from_cache=cached, cache=None, out=tmp_path / "out", preprocess="bit32", fit=None
    )
    assert list(run(again).metrics) == ["msp"]


def test_a_cache_that_is_not_complete(cached, options, tmp_path):
    path = cached / "scores" / "far.parquet" / "00000-00000.parquet"
    content = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(ValueError, match="does not hold each of the 9 images of far once"):
            run(EvaluateOptions(from_cache=cached, out=tmp_path / "out", detectors=("msp",)))
    finally:
        path.write_bytes(content)
