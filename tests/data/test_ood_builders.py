import contextlib
import functools
import gzip
import hashlib
import http.server
import socket
import tarfile
import threading
import unittest

import pytest
import tensorflow_datasets as tfds

from gradnorm_jax.data import ood_builders
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.tfds_prepare import prepare

SETS = {
    "inaturalist_ood": "iNaturalist",
    "sun_ood": "SUN",
    "places_ood": "Places",
}
FILES = ("images/b.jpg", "images/a.jpg", "images/sub/c.JPEG", "images/d.png")


@pytest.fixture(autouse=True)
def four_images(monkeypatch):
    monkeypatch.setattr(ood_builders.OODBuilder, "IMAGES", len(FILES))


@pytest.fixture
def pack(tmp_path, make_images):
    """Makes the folder `unpacked/TOP`, and `manual/TOP.tar.gz` of it; returns the latter."""

    def make(top, files=FILES, junk=("images/._a.jpg", "readme.txt")):
        unpacked = make_images(f"unpacked/{top}", *files, *junk)
        (tmp_path / "manual").mkdir(exist_ok=True)
        archive = tmp_path / "manual" / f"{top}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(unpacked, f"./{top}")
        return archive

    return make


def contents(tmp_path, top):
    folder = tmp_path / "unpacked" / top
    return {file: (folder / file).read_bytes() for file in FILES}


def by_id(spec, data_dir):
    source = open_source(spec, data_dir)
    records = {record.id: record.data for record in source}
    assert len(records) == len(source)
    assert {record.label for record in source} == {-1}
    return records


@pytest.mark.parametrize(("name", "top"), SETS.items())
def test_archive_in_the_manual_folder(tmp_path, pack, name, top):
    pack(top)
    result = prepare(name, data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
    assert (result.images, result.action) == ({"test": 4}, "prepared")
    assert by_id(f"tfds:{name}", tmp_path / "data") == contents(tmp_path, top)


def test_unpacked_folder_gives_the_same_as_the_archive(tmp_path, pack):
    pack("SUN")
    for manual in ("manual", "unpacked"):
        prepare("sun_ood", data_dir=tmp_path / f"by_{manual}", manual_dir=tmp_path / manual)
    first, second = (
        open_source("tfds:sun_ood", tmp_path / f"by_{m}") for m in ("manual", "unpacked")
    )
    assert list(first) == list(second)
    assert [record.id for record in first] != sorted(FILES)  # mixed by tfds, the same each time


@contextlib.contextmanager
def serve(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_download(tmp_path, pack, monkeypatch):
    archive = pack("Places")
    with serve(tmp_path / "manual") as address:
        monkeypatch.setattr(ood_builders, "ADDRESS", address)
        prepare("places_ood", data_dir=tmp_path / "data")
    assert by_id("tfds:places_ood", tmp_path / "data") == contents(tmp_path, "Places")
    url, size, checksum, _ = (
        (tmp_path / "data" / "places_ood" / "checksums.tsv").read_text().strip().split("\t")
    )
    assert url == f"{address}Places.tar.gz"
    assert int(size) == archive.stat().st_size
    assert checksum == hashlib.sha256(archive.read_bytes()).hexdigest()


BY_HAND = (
    "; put into a folder what has to be downloaded by hand (Places.tar.gz, or the folder that it "
    "unpacks to, from http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/Places.tar.gz), and "
    "run gradnorm-jax data prepare places_ood --data-dir {} --manual-dir FOLDER"
)


def test_failed_download_names_the_way_by_hand_at_once(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(ood_builders, "ADDRESS", f"http://127.0.0.1:{port}/")
    with pytest.raises(OSError, match=r"places_ood cannot be prepared: .*refused") as error:
        prepare("places_ood", data_dir=tmp_path)
    assert str(error.value).endswith(BY_HAND.format(tmp_path))


def test_manual_folder_without_the_archive_is_refused(tmp_path, make_images):
    other = make_images("other", "a.png")
    for folder, reason in {
        tmp_path / "nowhere": f"there is no folder {tmp_path}/nowhere",
        other: f"{other} holds neither Places.tar.gz nor its folder",
    }.items():
        with pytest.raises(OSError, match=r"places_ood cannot be prepared") as error:
            prepare("places_ood", data_dir=tmp_path, manual_dir=folder)
        expected = f"places_ood cannot be prepared: {reason}{BY_HAND.format(tmp_path)}"
        assert str(error.value) == expected


def test_another_archive_is_refused_the_second_time(tmp_path, pack):
    options = {"data_dir": tmp_path / "data", "manual_dir": tmp_path / "manual"}
    archive = pack("SUN")
    folder = prepare("sun_ood", **options).folder

    def again():
        for file in sorted((tmp_path / "data" / "sun_ood" / "1.0.0").glob("*")):
            file.unlink()
        (tmp_path / "data" / "sun_ood" / "1.0.0").rmdir()
        return prepare("sun_ood", **options)

    assert again().folder == folder
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"SUN\.tar\.gz is not the file that was used before"):
        again()


def test_incomplete_archive_is_refused_and_not_recorded(tmp_path, pack):
    options = {"data_dir": tmp_path / "data", "manual_dir": tmp_path / "manual"}
    archive = pack("iNaturalist")
    whole = archive.read_bytes()
    cut = [whole[: len(whole) * i // 16] for i in range(1, 15)]
    for contents in (*cut, b"", b"<html>404</html>"):
        archive.write_bytes(contents)
        with pytest.raises(ValueError, match=r"is damaged or incomplete: get it again"):
            prepare("inaturalist_ood", **options)
    archive.write_bytes(gzip.decompress(whole))  # as some servers and clients do on the way
    assert prepare("inaturalist_ood", **options).images == {"test": 4}


def test_wrong_number_of_images(tmp_path, pack):
    pack("SUN", files=FILES[:3])
    for manual in ("manual", "unpacked"):
        with pytest.raises(ValueError, match=r"sun_ood has 4 images, but 3 were found"):
            prepare("sun_ood", data_dir=tmp_path / "data", manual_dir=tmp_path / manual)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "top"), SETS.items())
def test_by_the_test_case_of_tfds(tmp_path, pack, name, top):
    for module in ("tensorflow", "dill"):
        pytest.importorskip(module, reason="tfds's own test case for builders needs it")
    pack(top)
    attributes = {
        "DATASET_CLASS": tfds.builder(name, data_dir=tmp_path).__class__,
        "EXAMPLE_DIR": str(tmp_path / "manual"),
        "SPLITS": {"test": len(FILES)},
        "SKIP_CHECKSUMS": True,  # The package records them on the user's machine.
    }
    case = type("Case", (tfds.testing.DatasetBuilderTestCase,), attributes)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert (result.errors, result.failures) == ([], [])
    assert result.testsRun >= 3


def test_sizes_are_those_of_the_paper(monkeypatch):
    monkeypatch.undo()
    assert {builder.IMAGES for builder in ood_builders.OODBuilder.__subclasses__()} == {10_000}
