import pickle

import grain
import pytest

from gradnorm_jax.data.folder_source import folder_source
from gradnorm_jax.data.source import Record
from tests.data.files import make, records


def test_flat_folder(tmp_path):
    source = folder_source(make(tmp_path / "set", "b.png", "a.jpg", "B.JPEG", "c.txt", "d"))
    assert source.name == "set"
    assert records(source) == [
        Record("B.JPEG", -1, b"B.JPEG"),
        Record("a.jpg", -1, b"a.jpg"),
        Record("b.png", -1, b"b.png"),
    ]
    assert list(source.ignored) == ["c.txt", "d"]


def test_class_folders_label_in_sorted_order(tmp_path):
    make(tmp_path, "dog/1.png", "cat/2.png", "cat/deep/3.png", "readme.txt")
    (tmp_path / "cow").mkdir()  # the second class, of which no image is left
    source = folder_source(tmp_path)
    assert list(source.ids) == ["cat/2.png", "cat/deep/3.png", "dog/1.png"]
    assert [record.label for record in records(source)] == [0, 0, 2]
    assert list(source.ignored) == ["readme.txt"]


@pytest.mark.parametrize(
    "files",
    [("cat/1.png", "dog/2.png", "3.png"), ("images/1.png", "images/2.png")],
    ids=["images beside the folders", "a single folder"],
)
def test_labels_are_unknown_where_folders_are_not_classes(tmp_path, files):
    assert {record.label for record in records(folder_source(make(tmp_path, *files)))} == {-1}


def test_hidden_files_are_counted_and_no_class(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png", "a/._1.png", ".cache/3.png", ".DS_Store")
    source = folder_source(tmp_path)
    assert [(record.id, record.label) for record in records(source)] == [
        ("a/1.png", 0),
        ("b/2.png", 1),
    ]
    assert list(source.ignored) == [".DS_Store", ".cache/3.png", "a/._1.png"]


def test_linked_folders_are_followed(tmp_path):
    make(tmp_path / "real", "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    assert list(folder_source(tmp_path / "set").ids) == ["linked/1.png"]


def test_links_that_lead_back_are_refused(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"links back to a folder that holds it"):
        folder_source(tmp_path)


EXTENSIONS = "jpg jpeg png bmp webp gif tif tiff ppm pgm JPG Png TIFF"


@pytest.mark.parametrize("extension", EXTENSIONS.split())
def test_extensions(tmp_path, extension):
    assert len(folder_source(make(tmp_path, f"x.{extension}", "x.npy"))) == 1


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the image folder .*nowhere does not exist"):
        folder_source(tmp_path / "nowhere")


def test_file_for_a_folder(tmp_path):
    make(tmp_path, "x.png")
    with pytest.raises(ValueError, match=r"x\.png is not a folder"):
        folder_source(tmp_path / "x.png")


@pytest.mark.parametrize("files", [(), ("a.txt", "b.csv")])
def test_folder_without_images(tmp_path, files):
    with pytest.raises(ValueError, match=f"holds no image: none of its {len(files)} files"):
        folder_source(make(tmp_path, *files))


def test_name_that_is_not_utf8(tmp_path):
    (tmp_path / "\udce9.png").write_bytes(b"content")
    (record,) = records(folder_source(tmp_path))
    assert (record.id, record.data) == ("\udce9.png", b"content")


def test_a_source_is_grains_and_pickles(tmp_path):
    source = folder_source(make(tmp_path, "a/1.png", "b/2.png"))
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    assert records(pickle.loads(pickle.dumps(source))) == records(source)


def test_file_that_goes_away(tmp_path):
    source = folder_source(make(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        source[0]
