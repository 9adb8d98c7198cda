import concurrent.futures
import functools
import json
import os
import struct
import tarfile
import types

import grain
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder
from tensorflow_datasets.core.download import downloader

from gradnorm_jax.data import tfrecord
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.tfds_prepare import Prepared, prepare, prepare_source


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """A record of a TFRecord file."""

    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def test_checksums_of_the_frames_are_right():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


@pytest.fixture
def source(make_images):
    return open_source(str(make_images("set", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))))


@pytest.fixture
def as_tfrecord(tmp_path, source):
    """A data set of eight images, prepared as two TFRecord files; returns its folder."""
    folder = tmp_path / "made" / "1.0.0"
    prepare_source(source, "made", data_dir=tmp_path)
    (old,) = folder.glob("*array_record*")
    records = open_source("tfds:made", tmp_path).records
    for number, part in enumerate((range(5), range(5, 8))):
        file = folder / f"made-test.tfrecord-0000{number}-of-00002"
        file.write_bytes(b"".join(frame(records[i]) for i in part))
    old.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    info["splits"][0]["shardLengths"] = ["5", "3"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfrecord_without_tensorflow(tmp_path, as_tfrecord, monkeypatch):
    monkeypatch.setattr(tfrecord.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        open_source("tfds:made", tmp_path)
    assert str(error.value) == (
        "made/1.0.0 is prepared as TFRecord, which only TensorFlow reads: pip install "
        "'gradnorm-jax[tf]', or convert it to ArrayRecord once: gradnorm-jax data prepare made "
        f"--data-dir {tmp_path}"
    )


def test_tfrecord_is_converted_without_tensorflow(tmp_path, as_tfrecord, source):
    result = prepare("made", data_dir=tmp_path)
    assert result == Prepared("made", str(as_tfrecord), {"test": 8}, "converted")
    assert list(open_source("tfds:made", tmp_path)) == [source[i] for i in range(8)]
    assert sorted(path.name for path in as_tfrecord.iterdir()) == [
        "dataset_info.json",
        "features.json",
        *(f"made-test.array_record-0000{i}-of-00002" for i in range(2)),
        *(f"made-test.tfrecord-0000{i}-of-00002" for i in range(2)),
    ]
    assert json.loads((as_tfrecord / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    assert prepare("made", data_dir=tmp_path).action == "found"


def test_tfrecord_has_the_fingerprint_of_array_record(tmp_path, as_tfrecord, monkeypatch):
    reads = []

    def read(path):
        reads.append(path)
        return tuple(grain.experimental.TFRecordIterDataset(path))

    monkeypatch.setattr(tfrecord, "_read", functools.lru_cache(maxsize=2)(read))
    monkeypatch.setattr(tfrecord.importlib.util, "find_spec", lambda name: True)
    fingerprint = open_source("tfds:made", tmp_path).fingerprint()
    assert len(reads) == 2
    prepare("made", data_dir=tmp_path)
    assert open_source("tfds:made", tmp_path).fingerprint() == fingerprint
    assert len(reads) == 2


def test_conversion_goes_on_after_it_was_cut_off(tmp_path, as_tfrecord, source, monkeypatch):
    second = as_tfrecord / "made-test.tfrecord-00001-of-00002"
    contents = second.read_bytes()
    second.write_bytes(contents[:-5])
    with pytest.raises(OSError, match=r"tfrecord-00001-of-00002 is not a TFRecord file, or is tru"):
        prepare("made", data_dir=tmp_path)
    assert [path.name for path in as_tfrecord.glob("*array_record*")] == [
        "made-test.array_record-00000-of-00002"
    ]
    second.write_bytes(contents)
    first = (as_tfrecord / "made-test.array_record-00000-of-00002").stat()
    assert prepare("made", data_dir=tmp_path).action == "converted"
    assert (as_tfrecord / "made-test.array_record-00000-of-00002").stat() == first
    assert list(open_source("tfds:made", tmp_path)) == [source[i] for i in range(8)]


def test_tfrecord_file_cut_between_two_records(tmp_path, as_tfrecord):
    (as_tfrecord / "made-test.tfrecord-00001-of-00002").write_bytes(b"")
    with pytest.raises(OSError, match=r"is truncated: it holds 0 records instead of 3"):
        prepare("made", data_dir=tmp_path)


def test_other_formats_are_refused(tmp_path, as_tfrecord):
    info = as_tfrecord / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    with pytest.raises(ValueError, match=r"made/1\.0\.0 is prepared as riegeli, which is not read"):
        open_source("tfds:made", tmp_path)
    with pytest.raises(ValueError, match=r"prepared as riegeli, which cannot be converted"):
        prepare("made", data_dir=tmp_path)


def test_tfrecord_by_tensorflow(tmp_path, as_tfrecord, source):
    pytest.importorskip("tensorflow", reason="reads TFRecord files by TensorFlow")
    prepared = open_source("tfds:made", tmp_path)
    assert list(prepared) == [source[i] for i in range(8)]
    assert list(open_source("tfds:made:test[3:7]", tmp_path)) == [source[i] for i in range(3, 7)]
    assert [prepared[i] for i in (7, 0, 4, 5)] == [source[i] for i in (7, 0, 4, 5)]


def test_damaged_tfrecord_by_tensorflow(tmp_path, as_tfrecord):
    pytest.importorskip("tensorflow", reason="reads TFRecord files by TensorFlow")
    path = as_tfrecord / "made-test.tfrecord-00000-of-00002"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(OSError, match=r"tfrecord-00000-of-00002 cannot be read"):
        open_source("tfds:made", tmp_path)[0]
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"tfrecord-00000-of-00002 holds only 0 records"):
        open_source("tfds:made", tmp_path)[0]


def test_each_tfrecord_file_is_read_once(as_tfrecord, monkeypatch):
    """Whatever the number of threads, as long as they read in order."""
    reads = []

    def dataset(path):
        reads.append(os.path.basename(path))
        return types.SimpleNamespace(
            as_numpy_iterator=lambda: iter(grain.experimental.TFRecordIterDataset(path))
        )

    fake = types.SimpleNamespace(
        data=types.SimpleNamespace(TFRecordDataset=dataset),
        errors=types.SimpleNamespace(OpError=RuntimeError),
    )
    monkeypatch.setattr(tfrecord, "_tensorflow", lambda: fake)
    paths = sorted(str(path) for path in as_tfrecord.glob("*tfrecord*"))
    records = tfrecord.TFRecords(((paths[0], 1, 4), (paths[1], 0, 3)))
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(records.__getitem__, range(7)))
    first, second = (list(grain.experimental.TFRecordIterDataset(path)) for path in paths)
    assert found == first[1:] + second
    assert len(records) == 7
    assert reads == [os.path.basename(path) for path in paths]


def test_data_set_of_that_name_is_there_already(tmp_path, source):
    first = prepare_source(source, "made", split="train", data_dir=tmp_path)
    assert first == Prepared("made", str(tmp_path / "made/1.0.0"), {"train": 8}, "prepared")
    assert prepare("made", data_dir=tmp_path) == first._replace(action="found")
    with pytest.raises(ValueError, match=r"there is a data set made in .* already: choose another"):
        prepare_source(source, "made", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [("My", "a"), ("a b", "a"), ("", "a"), ("a", "a-b"), ("a/b", "a"), ("1", "a")],
)
def test_names_that_cannot_be(tmp_path, source, name, split):
    with pytest.raises(ValueError, match=r"cannot be the name of a .*: use small letters"):
        prepare_source(source, name, split=split, data_dir=tmp_path)


def test_an_image_that_goes_away_leaves_nothing_behind(tmp_path, source):
    (source.root / source.ids[5]).unlink()
    with pytest.raises(OSError, match=r"b/1\.png"):
        prepare_source(source, "made", data_dir=tmp_path)
    assert list((tmp_path / "made").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="is not prepared"):
        open_source("tfds:made", tmp_path)


def test_unknown_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"neither tfds nor this package has a data set 'imagnet'"):
        prepare("imagnet", data_dir=tmp_path)


def test_manual_folder_that_is_not_there(tmp_path):
    """Though nothing has to be downloaded by hand."""
    with pytest.raises(OSError, match=r"cifar10 cannot be prepared: there is no folder .*nowhere$"):
        prepare("cifar10", data_dir=tmp_path, manual_dir=tmp_path / "nowhere")


def test_imagenet_is_downloaded_by_hand(tmp_path):
    with pytest.raises(OSError, match=r"imagenet2012 cannot be prepared") as error:
        prepare("imagenet2012", data_dir=tmp_path)
    message = str(error.value)
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in message
    assert "to evaluate, ILSVRC2012_img_val.tar is enough" in message
    assert message.endswith(
        f"and run gradnorm-jax data prepare imagenet2012 --data-dir {tmp_path} --manual-dir FOLDER"
    )
    assert "\n" not in message


@pytest.fixture
def imagenet_archive(tmp_path, make_images):
    """The validation archive of ImageNet, with three images."""
    names = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)]
    folder = make_images("val", *names)
    (tmp_path / "manual").mkdir()
    with tarfile.open(tmp_path / "manual" / "ILSVRC2012_img_val.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, name)
    return folder


def test_imagenet_needs_tensorflow_once(tmp_path, imagenet_archive, monkeypatch):
    def fail(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(dataset_builder.GeneratorBasedBuilder, "_download_and_prepare", fail)
    with pytest.raises(ImportError, match=r"tfds needs TensorFlow to prepare imagenet2012, though"):
        prepare("imagenet2012", data_dir=tmp_path, manual_dir=tmp_path / "manual")


def test_imagenet_by_tensorflow(tmp_path, imagenet_archive):
    pytest.importorskip("tensorflow", reason="tfds needs it to prepare ImageNet")
    prepare("imagenet2012", data_dir=tmp_path, manual_dir=tmp_path / "manual")
    source = open_source("tfds:imagenet2012:validation", tmp_path)
    files = {path.name: path.read_bytes() for path in imagenet_archive.iterdir()}
    assert {record.id: record.data for record in source} == files
    # The classes of the first three images of the whole set.
    labels = {record.id[-6]: record.label for record in source}
    assert labels == {"1": 65, "2": 970, "3": 230}


def test_failed_download_says_why(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to www.cs.toronto.edu")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
    with pytest.raises(OSError, match=r"cifar10 cannot be prepared: .*no route to www"):
        prepare("cifar10", data_dir=tmp_path)


def test_real_images(tmp_path, shared_data):
    source = open_source(f"csv:{shared_data}/imagenet/id_val.csv")
    assert prepare_source(source, "id_val", data_dir=tmp_path).images == {"test": 650}
    assert list(open_source("tfds:id_val", tmp_path)) == [source[i] for i in range(650)]


def test_tfds_knows_the_sets_of_this_package():
    names = {"inaturalist_ood", "sun_ood", "places_ood"}
    assert names <= set(tfds.list_builders(with_community_datasets=False))


def test_others_keep_their_number_of_retries(tmp_path, monkeypatch):
    kept = downloader.MAX_RETRIES
    assert kept > 3  # importing the module has not changed it
    meanwhile = []

    def refuse(*args, **kwargs):
        meanwhile.append(downloader.MAX_RETRIES)
        raise OSError("no network")

    monkeypatch.setattr(dataset_builder.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(OSError, match="no network"):
        prepare("sun_ood", data_dir=tmp_path)
    assert meanwhile == [3]
    assert kept == downloader.MAX_RETRIES
