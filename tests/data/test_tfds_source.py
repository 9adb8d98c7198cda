import json
import pickle
import shutil
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gradnorm_jax.data import tfds_prepare
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source_stream import source_stream
from gradnorm_jax.data.tfds_prepare import prepare_source
from gradnorm_jax.data.tfds_source import tfds_source

# The last byte of a record must survive, even where NumPy would take it for padding.
IMAGES = [b"\xff\xd8 zero\x00", b"", b"\x00", *(bytes([i]) * 9 for i in range(7))]


@pytest.fixture
def store(tmp_path):
    """Prepares a data set of the given features and examples by split; returns its data_dir."""

    def prepare(splits, features, name="made", **options):
        builder = tfds_prepare._SourceBuilder(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict(features),
            split_datasets={split: list(enumerate(rows)) for split, rows in splits.items()},
            data_dir=tmp_path,
            disable_shuffling=True,
            **options,
        )
        shards = min(2, *map(len, splits.values()))
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(num_shards=shards),
        )
        return tmp_path

    return prepare


@pytest.fixture
def two_splits(store):
    """Ten images of unknown name: seven in `train`, three in `test`."""
    rows = [{"image": data} for data in IMAGES]
    return store({"train": rows[:7], "test": rows[7:]}, {"image": tfds.features.Image()})


def test_round_trip_keeps_every_byte_id_and_label(tmp_path, make_images):
    folder = make_images("set", *(f"{name}/{i}.png" for name in "ab" for i in range(6)))
    (folder / "a" / "0.png").write_bytes(b"no image\x00\x00")
    source = open_source(str(folder))
    prepare_source(source, "my_set", data_dir=tmp_path)
    prepared = open_source("tfds:my_set", tmp_path)
    assert prepared.spec == "tfds:my_set"
    assert list(prepared) == [source[i] for i in range(12)]
    assert (prepared.name, len(prepared), prepared.ignored) == ("my_set", 12, ())
    assert {record.label for record in prepared} == {0, 1}
    assert prepared[-1] == prepared[11]
    with pytest.raises(IndexError):
        prepared[12]


def test_batches_equal_those_of_the_files(tmp_path, make_images):
    source = open_source(str(make_images("set", *(f"{i}.png" for i in range(5)))))
    prepare_source(source, "my_set", data_dir=tmp_path)
    prepared = open_source("tfds:my_set", tmp_path)
    preprocess = get_preprocess("bit32")
    streams = [source_stream(each, preprocess) for each in (source, prepared)]
    both = [list(stream.batches(BatchSchedule(2))) for stream in streams]
    for expected, batch in zip(*both, strict=True):
        np.testing.assert_array_equal(batch.data, expected.data)
        np.testing.assert_array_equal(batch.labels, expected.labels)
        assert (batch.ids, batch.excluded) == (expected.ids, expected.excluded)


def test_a_prepared_source_is_grains_and_pickles(two_splits):
    source = tfds_source("made:test", two_splits)
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("test", ["test[0]", "test[1]", "test[2]"]),
        ("train[5:]", ["train[5]", "train[6]"]),
        ("test+train[:2]", ["test[0]", "test[1]", "test[2]", "train[0]", "train[1]"]),
        ("test[34%:]", ["test[1]", "test[2]"]),
        ("all", [f"train[{i}]" for i in range(7)] + [f"test[{i}]" for i in range(3)]),
    ],
)
def test_splits_and_ids_by_position(two_splits, split, ids):
    source = tfds_source(f"made:{split}", two_splits)
    everything = dict(
        zip(
            [f"train[{i}]" for i in range(7)] + [f"test[{i}]" for i in range(3)],
            IMAGES,
            strict=True,
        )
    )
    assert [record.id for record in source] == ids
    assert [record.data for record in source] == [everything[i] for i in ids]
    assert {record.label for record in source} == {-1}
    assert len(source) == len(ids)


@pytest.mark.parametrize(
    ("position", "data"),
    [(0, b"\xff"), (99, b"\xff"), (50, b"longer")],
    ids=["first", "last", "size of another"],
)
def test_fingerprint_tells_versions_apart(store, position, data):
    rows = [{"image": bytes([i])} for i in range(100)]
    changed = [*rows[:position], {"image": data}, *rows[position + 1 :]]

    def fingerprint(rows):
        data_dir = store({"test": rows}, {"image": tfds.features.Image()})
        whole, part = (tfds_source(f"made:{split}", data_dir) for split in ("test", "test[:99]"))
        assert whole.fingerprint() != part.fingerprint()
        found = whole.fingerprint()
        shutil.rmtree(data_dir / "made")
        return found

    assert fingerprint(rows) == fingerprint(rows) != fingerprint(changed)


def test_textures_are_all_of_dtd(store):
    rows = [{"image": data} for data in IMAGES]
    splits = {"train": rows[:4], "test": rows[4:8], "validation": rows[8:]}
    source = tfds_source("dtd", store(splits, {"image": tfds.features.Image()}, name="dtd"))
    assert [record.data for record in source] == IMAGES


def test_two_splits_and_none_chosen(two_splits):
    with pytest.raises(
        ValueError, match=r"splits train \(7\), test \(3\): choose, as in tfds:made:train or"
    ):
        tfds_source("made", two_splits)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val", r"split 'val' of made, which has train \(7\), test \(3\): Unknown split"),
        ("test[1", "Error parsing split"),
        ("test+", "Error parsing split"),
        ("test[3:]", r"test\[3:3\] holds no image"),
        ("test[2:1]", r"test\[2:1\] holds no image"),
        ("test[50:60]", "incompatible with 3 examples"),
        ("all+test[2:]", r"test\[2\] is in it more than once"),
    ],
)
def test_bad_split(two_splits, split, message):
    with pytest.raises(ValueError, match=message):
        tfds_source(f"made:{split}", two_splits)


@pytest.mark.parametrize("spec", ["", ":test", "made:", "a b", "../made", "made/x/y"])
def test_bad_name(two_splits, spec):
    with pytest.raises(ValueError, match=r"NAME"):
        tfds_source(spec, two_splits)


@pytest.mark.parametrize("name", ["other", "made/config", "made:2.0.0", "imagenet2012"])
def test_not_prepared(two_splits, name):
    with pytest.raises(FileNotFoundError) as error:
        tfds_source(f"{name}:test", two_splits)
    assert str(error.value) == (
        f"the data set {name} is not prepared in {two_splits}: if it is elsewhere, give that "
        "folder as --data-dir or TFDS_DATA_DIR, or else run gradnorm-jax data prepare "
        f"{name} --data-dir {two_splits}"
    )


def test_version_and_configuration(store):
    rows = [{"image": data} for data in IMAGES]
    for config in ("one", "two"):
        data_dir = store({"test": rows}, {"image": tfds.features.Image()}, config=config)
    source = tfds_source("made/two:1.0.0:test[3:]", data_dir)
    assert (source.name, len(source)) == ("made-two", 7)


def test_home_folder_and_default_place(two_splits, monkeypatch):
    monkeypatch.setenv("HOME", str(two_splits.parent))
    assert len(tfds_source("made:test", f"~/{two_splits.name}")) == 3
    monkeypatch.setattr(tfds.core.utils.file_utils.constants, "DATA_DIR", str(two_splits))
    assert len(open_source("tfds:made:test")) == 3


TEXT, NUMBER = tfds.features.Text(), tfds.features.Scalar(np.int64)


@pytest.mark.parametrize(
    ("features", "row", "expected"),
    [
        ({"label": tfds.features.ClassLabel(num_classes=9)}, {"label": 7}, ("test[0]", 7)),
        ({"label": tfds.features.ClassLabel(num_classes=9)}, {"label": -1}, ("test[0]", -1)),
        ({"label": TEXT}, {"label": "cat"}, ("test[0]", -1)),
        ({"label": tfds.features.Tensor(shape=(2,), dtype=np.int64)}, {"label": [3, 4]}, None),
        ({"file_name": TEXT, "id": TEXT}, {"file_name": "ä.png", "id": "x"}, ("ä.png", -1)),
        ({"id": NUMBER}, {"id": 42}, ("42", -1)),
    ],
)
def test_features_of_labels_and_ids(store, features, row, expected):
    features = {"image": tfds.features.Image(), **features}
    (record,) = tfds_source("made", store({"test": [{"image": b"x", **row}]}, features))
    assert (record.id, record.label) == (expected or ("test[0]", -1))


def test_an_image_by_another_name_beside_other_features(store):
    features = {"photo": tfds.features.Image(), "depth": tfds.features.Image(shape=(None, None, 1))}
    data_dir = store({"test": [{"photo": b"\x00photo\x00", "depth": b"x"}]}, features)
    # Writing an image of floats takes TensorFlow; it is stored as bytes all the same.
    path = data_dir / "made" / "1.0.0" / "features.json"
    described = json.loads(path.read_text())
    described["featuresDict"]["features"]["depth"]["image"]["dtype"] = "float32"
    path.write_text(json.dumps(described))
    assert tfds_source("made", data_dir)[0].data == b"\x00photo\x00"


@pytest.mark.parametrize("names", [(), ("left", "right")])
def test_no_telling_which_feature_is_the_image(store, names):
    features = {"text": TEXT, **{name: tfds.features.Image() for name in names}}
    row = {"text": "a", **dict.fromkeys(names, b"x")}
    with pytest.raises(ValueError, match=f"is the image: .*{' and '.join(names[:1])}"):
        tfds_source("made", store({"test": [row]}, features))


def test_file_that_is_gone_or_damaged(two_splits):
    (path,) = two_splits.glob("made/1.0.0/made-test.array_record-00000*")
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 255
    for damage in (lambda: path.write_bytes(contents), path.unlink):
        damage()
        with pytest.raises(OSError, match=r"image 0 of the data set made cannot be read"):
            tfds_source("made:test", two_splits)[0]


def test_no_tensorflow_is_needed_and_files_do_not_need_tfds(tmp_path, make_images):
    folder = make_images("set", "a.png")
    code = f"""
import sys
from gradnorm_jax.data.open_source import open_source
source = open_source({str(folder)!r})
assert not {{"tensorflow", "tensorflow_datasets"}} & set(sys.modules)
from gradnorm_jax.data.tfds_prepare import prepare_source
prepare_source(source, "my_set", data_dir={str(tmp_path)!r})
assert open_source("tfds:my_set", {str(tmp_path)!r})[0] == source[0]
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
