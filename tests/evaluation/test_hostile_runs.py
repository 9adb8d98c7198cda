"""Runs on data, labels and folders that mislead."""

import io
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gradnorm_jax import from_apply
from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
from gradnorm_jax.evaluation.records import ID, ScoreTable
from gradnorm_jax.evaluation.run_config import read_config
from gradnorm_jax.evaluation.storage import encode_rows, open_folder, read_part
from gradnorm_jax.text import escape_markdown, printable, to_utf8
from tests.evaluation import networks
from tests.evaluation.networks import PREPROCESS, images, inputs, labels
from tests.hostile import an_answer_or_a_sentence

ROWS = "scores/ID.parquet/000000.parquet"
FIT_ROWS = "scores/fit.parquet/000000.parquet"
OUTPUTS = "cache/ID/000000.safetensors"


@pytest.fixture(scope="module")
def model():
    return networks.build()


def run(model, id_data, ood_data, **options):
    options = {"detectors": ["msp"], "preprocess": PREPROCESS, "batch_size": 16, **options}
    return evaluate(model, id_data, ood_data, progress=False, **options)


def write_images(folder, count, classes=None, seed=0):
    for i, image in enumerate(images(count, seed)):
        below = folder / f"class{i % classes}" if classes else folder
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(below / f"{i:03}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "id", 20, 3), write_images(tmp_path / "far", 9, seed=1)


def test_replaced_images_are_refused_and_the_difference_named(model, folders, tmp_path):
    run(model, folders[0], {"far": folders[1]}, out=tmp_path / "out")
    run(model, folders[0], {"far": folders[1]}, out=tmp_path / "out")
    path = folders[1] / "004.png"
    stat = path.stat()
    Image.fromarray(images(1, 9)[0]).resize((50, 50)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(FileExistsError, match="holds another run: the data of far are others"):
        run(model, folders[0], {"far": folders[1]}, out=tmp_path / "out")


@pytest.mark.parametrize("address", ["{}/out/", "{}/x/../out", "file://{}/out", "{}//out/."])
def test_another_spelling_of_a_path_is_the_same_run(model, folders, tmp_path, address):
    run(model, folders[0], {"far": folders[1]}, out=tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    run(model, f"{folders[0]}/", {"far": f"{folders[0]}/../far"}, out=address.format(tmp_path))
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert str(tmp_path) not in before.decode()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("classes", "known"), [(3, True), (2, False), (4, False)])
def test_class_folders_tell_classes_only_if_there_are_as_many(
    model, tmp_path, classes, known, cached
):
    id_data = write_images(tmp_path / "id", 20, classes)
    options = {"out": tmp_path / "out", "cache": "float32"} if cached else {}
    result = run(model, id_data, {"far": inputs(5)}, **options)
    if cached:
        result = evaluate_cache(tmp_path / "out", detectors=["msp"])
    assert (result.accuracy is not None) == known
    doubt = f"The accuracy is unknown: ID has {classes} class folders and the network 3 classes"
    assert (doubt in str(result)) != known
    assert (doubt in report.summary(result)) != known
    assert list(result.warnings) == report.to_dict(result)["warnings"]


@pytest.mark.parametrize(
    ("id_labels", "known", "doubt"),
    [
        (labels(9), True, ""),
        ([-1] * 9, False, ""),
        ([0, 1, 3] * 3, False, "ID has labels up to 3, and the network's classes are 0 to 2."),
        ([0, 1, -1] * 3, True, "The labels of ID go up to 1 and the network's classes to 2: the a"),
    ],
)
def test_labels_that_are_no_classes_of_the_network(model, id_labels, known, doubt):
    result = run(model, (inputs(9), id_labels), {"far": inputs(5)})
    assert (result.accuracy is not None) == known
    assert doubt in str(result)
    assert bool(result.warnings) == bool(doubt)


def test_the_offset_of_labels_counts(model):
    result = run(model, (inputs(9), labels(9)), {"far": inputs(5)}, label_offset=1)
    assert result.accuracy is None
    result = run(model, (inputs(9), labels(9) % 2), {"far": inputs(5)}, label_offset=1)
    assert result.accuracy is not None


def test_the_same_data_twice_is_said(model, folders, tmp_path):
    result = run(model, folders[0], {"far": f"{folders[0]}/../id/", "other": folders[1]})
    assert result.warnings == ["ID and far are the same data."]
    x = inputs(9)
    assert run(model, x, {"far": x.copy(), "other": lambda: iter([x])}).warnings == [
        "ID and far are the same data."
    ]


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("gradnorm(select=nope)", r"gradnorm\(select=nope\): select='nope' matched no parameters"),
        ("gradnorm(include_bias=true)", "the model's last layer has no bias; leave out"),
    ],
)
def test_options_are_compared_with_the_model_before_any_work(tmp_path, detector, message):
    def apply(params, x):
        return jnp.tanh(x @ params["body"]) @ params["kernel"]

    params = {"body": np.ones((6, 4), np.float32), "kernel": np.ones((4, 3), np.float32)}
    model = from_apply(apply, params, jnp.zeros((2, 6)))

    def untouched():
        pytest.fail("read")
        yield

    with pytest.raises(ValueError, match=message):
        evaluate(
            model, untouched, {"far": untouched}, detectors=["msp", detector], out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def run_with_cache(model, out):
    return run(
        model,
        (inputs(37), labels(37)),
        {"far": inputs(5)},
        fit=(inputs(20, 2), labels(20)),
        detectors=["msp", "mahalanobis"],
        out=out,
        cache="float32",
    )


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    run_with_cache(model, out)
    return out


@pytest.fixture
def kept(model, finished, tmp_path):
    """A finished run with a cache, and how to run it again."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run", lambda: run_with_cache(model, tmp_path / "run")


def read_all(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.parent.name != "journal"}


def cut_rows(path):
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(3), path)


def drop_column(path):
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["msp"]), path)


def drop_metadata(path):
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({}), path)


def empty(path):
    path.write_bytes(b"")


def scribble(path):
    content = path.read_bytes()
    start = len(content) // 4
    path.write_bytes(content[:start] + bytes(40) + content[start + 40 :])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((ROWS, d) for d in (cut_rows, drop_column, drop_metadata, empty, scribble, os.remove)),
        *((FIT_ROWS, d) for d in (cut_rows, drop_metadata, empty, scribble, os.remove)),
        *((OUTPUTS, d) for d in (empty, scribble, os.remove)),
    ],
)
def test_a_run_mends_its_own_files(kept, file, damage):
    folder, again = kept
    before = read_all(folder)
    damage(folder / file)
    again()
    assert read_all(folder) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cache/head.safetensors", b"", r"head\.safetensors is damaged; run the command that w"),
        ("cache/head.safetensors", safetensors.numpy.save({"x": np.ones(2)}), "head.* is damaged"),
        (OUTPUTS, b"", r"cache/ID/000000\.safetensors is damaged; run the command that wrote it"),
        (ROWS, b"PAR1", r"ID\.parquet/000000\.parquet is damaged .*; run the command that wrote"),
        ("config.json", b"{}", r"config\.json is not that of a run: it describes no run"),
        ("config.json", b"[]", r"config\.json is not that of a run"),
        ("config.json", b'{"cache": "float32"}', r"config\.json is not that of a run"),
        ("config.json", b'{"cache": "float32", "versions": {}}', r"config\.json is damaged"),
        ("config.json", b"[" * 100_000, r"config\.json is not that of a run"),
    ],
)
def test_a_damaged_cache_is_said_and_how_to_mend_it(kept, file, content, message):
    folder, again = kept
    expected = evaluate_cache(folder, detectors=["msp", "mahalanobis"])
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate_cache(folder, detectors=["msp", "mahalanobis"])
    if file == "config.json":
        with pytest.raises((ValueError, FileExistsError), match=r"config\.json|holds another run"):
            again()
        return
    again()
    assert (folder / file).read_bytes() == whole
    assert evaluate_cache(folder, detectors=["msp", "mahalanobis"]).metrics == expected.metrics


def test_a_cache_elsewhere_is_the_same_run(kept, tmp_path):
    folder, _ = kept
    evaluate_cache(folder, detectors=["msp"], out=tmp_path / "again")
    shutil.move(folder, tmp_path / "moved")
    evaluate_cache(f"{tmp_path}/x/../moved/", detectors=["msp"], out=tmp_path / "again")


NAME = "b\udce9 [bold red]x[dim] <i> *y* | \x1b[31m\n.png"


def test_any_name_of_a_file_survives_from_end_to_end(model, folders, tmp_path, capsys):
    shutil.copy(folders[1] / "000.png", folders[1] / NAME)
    (folders[1] / f"bad {NAME}").write_bytes(b"no image")
    (folders[1] / f"{NAME}.txt").write_bytes(b"no image")
    result = run(model, folders[0], {"far": folders[1]}, out=tmp_path / "out", max_undecodable=0.5)
    assert to_utf8(NAME) in result.tables["far"].ids
    stored, _ = read_part(open_folder(tmp_path / "out"), "far", 0)
    assert stored.ids == result.tables["far"].ids
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_bytes())
    assert {each["id"] for each in metrics["excluded"]["far"]} == {
        to_utf8(f"bad {NAME}"),
        to_utf8(f"{NAME}.txt"),
    }
    shown = r"bad b\xe9 [bold red]x[dim] <i> *y* | \x1b[31m\n.png"
    assert shown in str(result)
    assert "&lt;i&gt;" in result._repr_html_()
    text = (tmp_path / "out" / "report.md").read_text()
    assert r"bad b\\xe9 \[bold red\]x\[dim\] \<i\> \*y\* \| \\x1b\[31m\\n.png" in text
    for everything in (str(result), result._repr_html_(), text):
        assert "\x1b" not in everything


@given(text=st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_shown(text):
    to_utf8(text).encode()
    assert printable(text).isprintable()
    assert "\n" not in escape_markdown(text)


def table(count):
    return ScoreTable(
        np.arange(count),
        [f"{i}.png" for i in range(count)],
        np.zeros(count, np.int32),
        np.ones(count, np.int32),
        {"msp": np.linspace(0, 1, count).astype(np.float32)},
        [Excluded("x.png", "no image", count)],
    )


@given(data=st.data())
@settings(max_examples=300, deadline=5000)
def test_any_damage_of_rows_is_noticed(data):
    whole = encode_rows(table(20), {"outputs": "abc"})
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    folder = open_folder("/nowhere")
    with (
        pytest.MonkeyPatch.context() as patch,
        an_answer_or_a_sentence("/nowhere/scores/ID.parquet/000000.parquet is damaged"),
    ):
        patch.setattr(type(folder), "read", lambda *_: damaged)
        found, facts = read_part(folder, "ID", 0)
        # What decides nothing, such as statistics of columns, may be damaged.
        assert encode_rows(found, facts) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from(["versions", "cache", "data", "batch_size", "label_offset", "ID"]),
            below,
        )
    ),
    max_leaves=8,
)


@given(content=st.one_of(st.binary(max_size=30), JSON.map(json.dumps).map(str.encode)))
@settings(max_examples=200, deadline=5000)
def test_any_config_is_read_or_refused(content):
    folder = open_folder("/nowhere")
    with pytest.MonkeyPatch.context() as patch, an_answer_or_a_sentence("/nowhere/"):
        patch.setattr(type(folder), "read", lambda *_: content)
        config = read_config(folder)
        assert isinstance(config["versions"], dict)
    with pytest.MonkeyPatch.context() as patch, an_answer_or_a_sentence("/nowhere"):
        patch.setattr(type(folder), "read", lambda self, name: content if "c" in name else None)
        patch.setattr(type(folder), "names", lambda *_: [])
        evaluate_cache("/nowhere", detectors=["msp"])


@pytest.mark.parametrize("temperature", [1e6, 1e-3])
def test_histograms_of_any_scores(model, tmp_path, temperature):
    detectors = [f"energy(temperature={temperature})", f"gradnorm(temperature={temperature})"]
    run(model, inputs(9), {"far": inputs(5)}, detectors=detectors, out=tmp_path / "out")
    with Image.open(io.BytesIO((tmp_path / "out" / "histograms.png").read_bytes())) as image:
        image.load()


def test_a_run_that_stops_at_its_first_batch_is_in_nobodys_way(model, tmp_path):
    far = inputs(9)
    far[0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite on ID"):
        run(model, far, {"far": inputs(5)}, out=tmp_path / "out")
    assert run(model, inputs(9), {"far": inputs(5)}, out=tmp_path / "out").tables[ID]
