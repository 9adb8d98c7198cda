"""The one entry: every kind of data, memory and folders, devices, processes."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gradnorm_jax import from_apply
from gradnorm_jax.cli import main
from gradnorm_jax.data import as_stream
from gradnorm_jax.detectors import Detector, gradnorm, mahalanobis, msp, odin
from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
from gradnorm_jax.evaluation.records import ID, Interrupted, Unfinished
from gradnorm_jax.evaluation.storage import open_folder, read_table
from gradnorm_jax.fitted import fit
from tests.evaluation import networks
from tests.evaluation.networks import PREPROCESS, images, inputs, labels, ragged

DETECTORS = ("msp", "odin(epsilon=0.01)", "mahalanobis", "energy", "gradnorm", "gradnorm(ord=2)")
PIXELS = {"ID": images(37), "near": images(21, seed=1), "far": images(8, seed=2) // 4}
TRAINING = images(45, seed=3)


@pytest.fixture(scope="module")
def model():
    return networks.build()


def run(model, id_data, ood_data, **options):
    options = {"detectors": DETECTORS, "preprocess": PREPROCESS, "batch_size": 16, **options}
    return evaluate(model, id_data, ood_data, progress=False, **options)


@pytest.fixture(scope="module")
def expected(model):
    """The result of arrays in memory, which all other ways must give as well."""
    return run(
        model,
        (PIXELS["ID"], labels(37)),
        {name: PIXELS[name] for name in ("near", "far")},
        fit=(TRAINING, labels(45)),
    )


def assert_same(result, expected, *, ids=True):
    assert list(result.tables) == list(expected.tables)
    for name, table in expected.tables.items():
        found = result.tables[name]
        if ids:
            assert list(found.ids) == list(table.ids)
        np.testing.assert_array_equal(found.positions, table.positions)
        np.testing.assert_array_equal(found.labels, table.labels)
        np.testing.assert_array_equal(found.predictions, table.predictions)
        assert list(found.scores) == list(table.scores)
        for detector, scores in table.scores.items():
            np.testing.assert_allclose(found.scores[detector], scores, rtol=1e-6, err_msg=detector)
    assert result.metrics == expected.metrics
    assert result.accuracy == expected.accuracy


def test_arrays_in_memory(expected, model):
    assert list(expected.tables) == [ID, "near", "far"]
    assert list(expected.metrics) == list(DETECTORS)
    assert not expected.not_run
    pixels = np.stack([PREPROCESS.pixels(Image.fromarray(x)) for x in PIXELS["ID"]])
    outputs = model((jnp.asarray(pixels, jnp.float32) / 255 - 0.5) / 0.5)
    predictions = outputs.logits.argmax(axis=-1)
    np.testing.assert_array_equal(expected.tables[ID].predictions, predictions)
    assert expected.accuracy == (predictions == labels(37)).mean()
    np.testing.assert_allclose(
        expected.scores["msp", ID], jax.nn.softmax(outputs.logits).max(axis=-1), rtol=1e-6
    )
    assert expected["msp", "far"] == expected.metrics["msp"]["far"]


def test_a_folder_for_the_results(expected, model, tmp_path):
    result = run(
        model,
        (PIXELS["ID"], labels(37)),
        {name: PIXELS[name] for name in ("near", "far")},
        fit=(TRAINING, labels(45)),
        out=tmp_path,
    )
    assert_same(result, expected)
    for name, table in result.tables.items():
        stored = read_table(open_folder(tmp_path), name, 256)
        assert list(stored.ids) == list(table.ids)
        np.testing.assert_array_equal(stored.scores["gradnorm"], table.scores["gradnorm"])


def test_ragged_batches_of_a_generator(expected, model):
    result = run(
        model,
        lambda: ragged(PIXELS["ID"], labels(37)),
        {name: lambda x=PIXELS[name]: ragged(x, np.full(len(x), -1)) for name in ("near", "far")},
        fit=lambda: ragged(TRAINING, labels(45)),
    )
    assert_same(result, expected)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_any_number_of_devices(expected, model, devices):
    result = run(
        model,
        (PIXELS["ID"], labels(37)),
        {name: PIXELS[name] for name in ("near", "far")},
        fit=(TRAINING, labels(45)),
        mesh=networks.as_device_count(devices),
    )
    assert_same(result, expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pixels as files, in class folders where there are classes."""
    root = tmp_path_factory.mktemp("folders")
    for name, pixels in {**PIXELS, "fit": TRAINING}.items():
        for i, image in enumerate(pixels):
            below = root / name / (f"class{i % 3}" if name in ("ID", "fit") else "")
            below.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(below / f"{i:03}.png")
    return root


def test_folders_of_files_on_the_command_line(expected, folders, tmp_path):
    main(
        [
            *("evaluate", "--model", "tests.evaluation.networks:build", "--out", str(tmp_path)),
            *("--id", f"{folders}/ID", "--ood", f"near={folders}/near", "--ood"),
            *(f"far={folders}/far", "--fit", f"{folders}/fit", "--detectors", *DETECTORS),
            *("--preprocess", PREPROCESS.name, "--batch-size", "16"),
        ]
    )
    # Files are in the order of their names: class by class.
    order = np.argsort(labels(37), kind="stable")
    for name, table in expected.tables.items():
        stored = read_table(open_folder(tmp_path), name, 256)
        rows = order if name == ID else np.arange(len(table.ids))
        assert list(stored.ids) == [
            f"class{i % 3}/{i:03}.png" if name == ID else f"{i:03}.png" for i in rows
        ]
        np.testing.assert_array_equal(stored.labels, table.labels[rows])
        np.testing.assert_array_equal(stored.predictions, table.predictions[rows])
        for detector, scores in table.scores.items():
            np.testing.assert_allclose(
                stored.scores[detector], scores[rows], rtol=1e-6, err_msg=detector
            )
    report = (tmp_path / "report.md").read_text()
    for detector, cells in expected.metrics.items():
        for cell in cells.values():
            assert f"{100 * cell.auroc.value:.2f}" in report, detector


@pytest.mark.parametrize("process_count", [1, 3])
def test_a_cache(expected, model, tmp_path, process_count):
    for process in [*range(process_count)] * 2:
        with_cache(model, tmp_path / "run", (process, process_count))
    result = evaluate_cache(tmp_path / "run", detectors=DETECTORS, progress=False)
    assert list(result.not_run) == ["odin(epsilon=0.01)"]
    assert "runs the network" in result.not_run["odin(epsilon=0.01)"]
    assert_same(result, without(expected, "odin(epsilon=0.01)"))


def with_cache(model, out, process, cache="float32", detectors=("msp",)):
    """A run that has no use for its training data, but keeps what the network makes of them."""
    try:
        run(
            model,
            (PIXELS["ID"], labels(37)),
            {name: PIXELS[name] for name in ("near", "far")},
            fit=(TRAINING, labels(45)),
            detectors=detectors,
            out=out,
            cache=cache,
            process=process,
            wait_seconds=0,
        )
    except (Unfinished, Interrupted):
        assert process[1] > 1


def without(result, detector):
    """The result as if the detector had not been asked for."""

    def drop(by_detector):
        return {name: value for name, value in by_detector.items() if name != detector}

    tables = {
        name: table._replace(scores=drop(table.scores)) for name, table in result.tables.items()
    }
    return dataclasses.replace(result, tables=tables, metrics=drop(result.metrics))


KINDS = {
    "JAX arrays": lambda x, y: (jnp.asarray(x), jnp.asarray(y)),
    "mapping": lambda x, y: {"image": x, "label": y},
    "list": lambda x, y: list(ragged(x, y)),
    "function": lambda x, y: lambda: ragged(x, y),
    "stream": lambda x, y: as_stream((x, y)),
    "masked": lambda x, y: [
        {"image": np.repeat(x, 2, axis=0), "label": np.repeat(y, 2), "mask": [True, False] * len(x)}
    ],
    "examples": lambda x, y: [{"image": a, "label": b} for a, b in zip(x, y, strict=True)],
    "Grain": lambda x, y: grain.MapDataset.source(
        [{"image": a, "label": b} for a, b in zip(x, y, strict=True)]
    ).batch(5),
}


@pytest.mark.parametrize("shape", [(50,), (4, 4, 4, 1), (5, 6, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_floats_of_any_shape_and_kind(kind, shape):
    model = networks.build(int(np.prod(shape)))
    data = {name: inputs(n, n, shape) for name, n in {"ID": 11, "far": 9, "fit": 30}.items()}
    make = KINDS[kind]
    results = [
        evaluate(
            model,
            make_it(data["ID"], labels(11)),
            {"far": make_it(data["far"], labels(9))},
            detectors=["energy", "gradnorm", "mahalanobis"],
            fit=make_it(data["fit"], labels(30)),
            batch_size=8,
        )
        for make_it in (lambda x, y: (x, y), make)
    ]
    assert_same(*results[::-1])


def test_a_function_prepares_whole_batches_on_the_devices(model):
    pixels = {name: images(9, seed, (6, 6, 3)) for seed, name in enumerate(("ID", "far"))}
    scaled = {name: (x.astype(np.float32) / 255 - 0.5) / 0.5 for name, x in pixels.items()}

    def prepare(batch):
        return (batch.astype(jnp.float32) / 255 - 0.5) / 0.5

    results = [
        evaluate(model, data["ID"], {"far": data["far"]}, detectors=["energy"], preprocess=how)
        for data, how in ((pixels, prepare), (scaled, None), (scaled, PREPROCESS))
    ]
    for result in results[1:]:
        assert_same(result, results[0])


def test_batch_sizes_and_devices_do_not_matter(model, expected):
    for batch_size, devices in ((1, 1), (7, 2), (64, 8), (1000, 1)):
        result = run(
            model,
            (PIXELS["ID"], labels(37)),
            {name: PIXELS[name] for name in ("near", "far")},
            fit=(TRAINING, labels(45)),
            batch_size=batch_size,
            mesh=networks.as_device_count(devices),
        )
        for key, scores in expected.scores.items():
            np.testing.assert_allclose(result.scores[key], scores, rtol=2e-5, err_msg=key)


def test_no_ragged_batch_and_no_rebuilt_object_is_traced_again():
    function, traces = networks.counted()
    scored = []

    def count(state, model, batch, *, scale):
        scored.append(1)
        return scale * batch.outputs.logits.max(axis=-1)

    def data(n, seed):
        return lambda: ragged(inputs(n, seed), labels(n))

    before = None
    for i in range(5):
        params = networks.make_params(108, seed=i)
        detectors = [
            Detector("count", "logits", count, options={"scale": 2.0}),
            gradnorm(ord=2),
            mahalanobis(),
            msp(),
            odin(epsilon=0.01),
        ]
        del traces[:]
        model = from_apply(function, params, jax.ShapeDtypeStruct((2, 108), jnp.float32))
        built = len(traces)
        evaluate(
            model,
            data(13 + i, 0),
            {"far": data(5 + 3 * i, 1), "near": data(30, 2)},
            detectors=detectors,
            fit=data(40, 3),
            batch_size=8,
        )
        if before is None:
            before = len(scored)
            assert before == 1
        else:
            assert len(traces) == built
        assert len(scored) == before


def test_parameters_that_are_spread_over_devices_stay_there(model, expected):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def shard(leaf):
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % 2 == 0][:1]
        axes = ("model" if axis in divisible else None for axis in range(leaf.ndim))
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    params = jax.tree.map(shard, model.params)
    assert not params["body"].sharding.is_fully_replicated
    result = run(
        model.replace(params=params),
        (PIXELS["ID"], labels(37)),
        {name: PIXELS[name] for name in ("near", "far")},
        fit=(TRAINING, labels(45)),
    )
    for key, scores in expected.scores.items():
        np.testing.assert_allclose(result.scores[key], scores, rtol=1e-5, err_msg=key)
    for detector, cells in expected.metrics.items():
        for name, cell in cells.items():
            assert result[detector, name].auroc.value == pytest.approx(cell.auroc.value, abs=1e-9)


@pytest.fixture(scope="module")
def headless():
    """A model without a linear last layer."""

    def normalised(params, images):
        logits = networks.apply(params, images)
        return logits / jnp.linalg.norm(logits, axis=-1, keepdims=True)

    params = networks.make_params(108)
    return from_apply(normalised, params, jnp.zeros((2, 108)), find_head=False)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_model_without_features(headless, tmp_path, in_folder):
    options = {"out": tmp_path / "run", "cache": "float32"} if in_folder else {}
    result = evaluate(
        headless,
        (inputs(9), labels(9)),
        {"far": inputs(5, 1)},
        detectors=["msp", "gradnorm", "mahalanobis", 'gradnorm(select="all")'],
        fit=(inputs(12, 2), labels(12)),
        **options,
    )
    assert list(result.metrics) == ["msp", 'gradnorm(select="all")']
    assert list(result.not_run) == ["gradnorm", "mahalanobis"]
    assert all("needs features" in why for why in result.not_run.values())
    assert "gradnorm was not run: it needs features" in str(result)
    with pytest.raises(ValueError, match="none of the detectors can be run: gradnorm: it needs f"):
        evaluate(headless, inputs(9), {"far": inputs(5)}, detectors=["gradnorm"])
    if in_folder:
        again = evaluate_cache(tmp_path / "run", detectors=["msp", "gradnorm"])
        assert list(again.not_run) == ["gradnorm"]
        np.testing.assert_array_equal(again.scores["msp", ID], result.scores["msp", ID])


def test_without_training_data_fitted_detectors_are_not_run(model):
    result = evaluate(model, inputs(9), {"far": inputs(5)}, detectors=["mahalanobis", "msp"])
    assert list(result.metrics) == ["msp"]
    assert list(result.not_run) == ["mahalanobis"]
    assert "none are given (fit)" in result.not_run["mahalanobis"]
    assert result.accuracy is None


def test_detectors_of_a_group_that_need_labels_are_not_run(model):
    result = evaluate(
        model, inputs(9), {"far": inputs(5)}, detectors=["all:output"], fit=inputs(20)
    )
    assert result.not_run == {
        "temperature_scaling": "it learns from labels, and the training data have none"
    }


def test_a_bank_without_all_training_images_is_reported(model, caplog):
    detectors = ["knn(k=2,bank_size=8)", "ash_s+knn(k=2,bank_size=8)"]
    data = {"far": inputs(5)}
    result = evaluate(model, inputs(9), data, detectors=detectors, fit=inputs(20))
    (warning,) = result.warnings
    assert "among 8 of 20; their options set how many" in warning
    assert not caplog.messages
    fit(detectors[0], model, inputs(20))
    assert caplog.messages == [warning]


def nothing(state, model, batch):
    return batch.outputs.logits[:, 0] * np.float32(np.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ood_data": {}}, "no OOD set is given; give at least one, as {name: data}"),
        ({"ood_data": {"fit": inputs(3)}}, "'fit' is taken"),
        ({"ood_data": {"id": inputs(3)}}, "'id' is taken"),
        ({"ood_data": {"ID": inputs(3), "far": inputs(3)}}, "'ID' is taken"),
        ({"ood_data": {"a": inputs(3), "A": inputs(3)}}, "'A' is taken"),
        ({"ood_data": {"a/b": inputs(3)}}, "'a/b' cannot be that of a file; use letters"),
        ({"ood_data": {"": inputs(3)}}, "'' cannot be that of a file"),
        ({"ood_data": {"..": inputs(3)}}, r"'\.\.' cannot be that of a file"),
        ({"ood_data": {7: inputs(3)}}, "7 cannot be that of a file"),
        ({"ood_data": {"a" * 101: inputs(3)}}, r"'aaaaaaaaaaaaaaaaaaaa'\.\.\. is too long"),
        ({"ood_data": inputs(3)}, r"ood_data must be {name: data}, got a ndarray"),
        ({"ood_data": {"far": iter([inputs(3)])}}, "a list_iterator can be read only once"),
        ({"id_data": None}, "cannot read data from a NoneType"),
        ({"id_data": inputs(0)}, "ID holds no input; give at least one"),
        ({"id_data": []}, "ID holds no input; give at least one"),
        ({"id_data": [inputs(0)]}, "ID holds no input; give at least one"),
        ({"fit": []}, "fit holds no input; give at least one"),
        ({"fit": [inputs(0)]}, "fit holds no input; give at least one"),
        ({"fit": (inputs(5), [-1] * 5)}, "training images have labels outside of 0..2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_undecodable": 2}, "max_undecodable is a fraction from 0 to 1, got 2"),
        ({"wait_seconds": float("nan")}, "wait_seconds must be at least 0, got nan"),
        ({"process": (2, 2)}, r"process must be \(i, n\) with 0 <= i < n, got \(2, 2\)"),
        (
            {"process": (0, 2)},
            "several processes cannot share results kept in memory: give a folde",
        ),
        (
            {"cache": "float32"},
            r"a cache cannot share results kept in memory: give a folder \(out\)",
        ),
        ({"detectors": []}, "no detectors are asked for; name one"),
        (
            {"detectors": ["nonsense"]},
            "unknown detector 'nonsense': `gradnorm-jax",
        ),
        ({"detectors": ["msp", "msp"]}, "detector 'msp' is asked for more than once"),
        ({"detectors": ["mahalanobis"], "fit": None}, "none of the detectors can be run"),
        ({"preprocess": "nonsense"}, "unknown preprocessing 'nonsense'"),
        ({"fit": (inputs(5), [7] * 5)}, r"labels outside of 0\.\.2"),
        (
            {"detectors": [Detector("broken", "logits", nothing)]},
            "broken gives scores that are not f",
        ),
    ],
)
def test_what_is_wrong_is_said(model, changes, message, tmp_path):
    arguments = {
        "id_data": inputs(9),
        "ood_data": {"far": inputs(5)},
        "detectors": ["mahalanobis", "msp"],
        "fit": (inputs(12), labels(12)),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        evaluate(model, **arguments)
    if "process" in changes or "cache" in changes or isinstance(changes.get("id_data"), list):
        return
    with pytest.raises(ValueError, match=message):
        evaluate(model, **arguments, out=tmp_path / "out")
    # Nothing is in the way of another try.
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_path_is_an_argument_of_the_wrong_kind(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(model, tmp_path / "nowhere", {"far": PIXELS["far"]})
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError, match="file already exists and is not a folder"):
        run(model, PIXELS["ID"], {"far": PIXELS["far"]}, out=tmp_path / "file", detectors=["msp"])


def test_progress_is_shown_by_what_is_given(model):
    shown = []

    def track(items, description, total):
        for item in items:
            shown.append((description, total))
            yield item

    evaluate(
        model,
        inputs(9),
        {"far": lambda: iter([inputs(5)])},
        detectors=["msp", "energy", "mahalanobis"],
        fit=(inputs(20), labels(20)),
        batch_size=8,
        progress=track,
    )
    # Of the last batch, which may be empty, too; a stream's length is not known.
    assert shown == [
        *[("fit", 3)] * 3,
        *[("ID", 2)] * 2,
        ("far", None),
        *[("metrics", 3)] * 3,
    ]
    with pytest.raises(TypeError, match="progress must be True, False or a function, got 'no'"):
        evaluate(model, inputs(9), {"far": inputs(5)}, detectors=["msp"], progress="no")
