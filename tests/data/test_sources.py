import pickle
from pathlib import Path

import grain
import pytest

from gradnorm_jax.data.sources import (
    Record,
    csv_source,
    folder_source,
    list_source,
    open_source,
)


def make(folder: Path, *files: str) -> Path:
    """Files whose contents are their names; sources do not decode."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    return folder


def records(source):
    return [source[i] for i in range(len(source))]


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
    (tmp_path / "\udce9.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not UTF-8: rename '\\udce9\.png'"):
        folder_source(tmp_path)


@pytest.fixture
def listed(tmp_path):
    """Writes `set.csv` beside the folder `set` and returns its path."""

    def write(text, encoding="utf-8"):
        make(tmp_path / "set", "a.png", "b.png", "sub/c.png")
        path = tmp_path / "set.csv"
        path.write_text(text, encoding=encoding)
        return path

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_keeps_its_order(listed, encoding):
    source = csv_source(listed("file,label\nb.png,7\nsub//c.png,-1\n./a.png,0\n", encoding))
    assert source.name == "set"
    assert records(source) == [
        Record("b.png", 7, b"b.png"),
        Record("sub/c.png", -1, b"sub/c.png"),
        Record("a.png", 0, b"a.png"),
    ]


def test_csv_without_labels_and_with_other_columns(listed):
    source = csv_source(listed('note,file\n"x, y",a.png\n,b.png\n'))
    assert [(record.id, record.label) for record in records(source)] == [
        ("a.png", -1),
        ("b.png", -1),
    ]


def test_csv_relative_to_its_own_folder(listed):
    source = csv_source(listed("file,label\nset/a.png,1\nset/sub/c.png,2\n"))
    assert records(source) == [
        Record("set/a.png", 1, b"a.png"),
        Record("set/sub/c.png", 2, b"sub/c.png"),
    ]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "no column 'file' but no columns"),
        ("path,label\na.png,1\n", ValueError, "no column 'file' but 'path', 'label'"),
        ("file,label\n", ValueError, "lists no image"),
        ("file,label\na.png,1\n,2\n", ValueError, "line 3: the column 'file' is empty"),
        ("file,label\na.png,cat\n", ValueError, "line 2: the label 'cat' is not a class number"),
        ("file,label\na.png,1.0\n", ValueError, "the label '1.0'"),
        ("file,label\na.png,-2\n", ValueError, "the label '-2'"),
        ("file,label\na.png,2147483648\n", ValueError, "the label '2147483648'"),
        ("file,label\na.png,\n", ValueError, "the label ''"),
        ("file,label\na.png\n", ValueError, "the label None"),
        ("file\na.png\nb.png\n./a.png\n", ValueError, "lists a.png more than once"),
        (
            "file\na.png\n1.png\n2.png\n3.png\n4.png\n",
            FileNotFoundError,
            "do not exist in .*set, 4 of 5: 1.png, 2.png, 3.png, ...$",
        ),
        ("file\nx.png\n", FileNotFoundError, "1 of 1: x.png$"),
    ],
)
def test_bad_csv(listed, text, error, message):
    with pytest.raises(error, match=message):
        csv_source(listed(text))


def test_csv_that_is_no_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"file\n\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"x\.csv is not a CSV file in UTF-8"):
        csv_source(path)


def test_missing_csv(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the CSV file .*x\.csv does not exist"):
        csv_source(tmp_path / "x.csv")


OPENOOD_LIST = "set/b.png -1\nset/with space.png\t7\n\n  set/a.png 0  \n"


def test_list_keeps_its_order(tmp_path):
    make(tmp_path, "set/a.png", "set/b.png", "set/with space.png")
    (tmp_path / "test_set.txt").write_text(OPENOOD_LIST)
    source = list_source(tmp_path / "test_set.txt")
    assert source.name == "test_set"
    assert records(source) == [
        Record("set/b.png", -1, b"set/b.png"),
        Record("set/with space.png", 7, b"set/with space.png"),
        Record("set/a.png", 0, b"set/a.png"),
    ]


def test_list_relative_to_a_folder_elsewhere(tmp_path, monkeypatch):
    """The layout of OpenOOD."""
    make(tmp_path / "images_largescale", "set/a.png", "set/b.png", "set/with space.png")
    (tmp_path / "benchmark@imglist").mkdir()
    path = tmp_path / "benchmark@imglist" / "test_set.txt"
    path.write_text(OPENOOD_LIST)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (tmp_path / "images_largescale", "~/images_largescale"):
        assert [record.label for record in records(open_source(f"list:{path}@{root}"))] == [
            -1,
            7,
            0,
        ]
    message = (
        r"do not exist in .*benchmark@imglist, 3 of 3: .*; name the folder .* list:FILE@FOLDER"
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_source(f"list:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no image"),
        ("\n \n", "lists no image"),
        ("a.png\n", "line 1: the label None is not a class number"),
        ("a.png 1\n\nb.png cat\n", "line 3: the label 'cat'"),
        ("a.png -2\n", "the label '-2'"),
        ("a.png 1\n./a.png 1\n", "lists a.png more than once"),
    ],
)
def test_bad_list(tmp_path, text, message):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(f"list:{tmp_path}/list.txt")


def test_list_that_is_no_text_or_missing(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xd8\xff 1")
    with pytest.raises(ValueError, match=r"x\.txt is not a text file in UTF-8"):
        list_source(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError, match=r"the list .*y\.txt does not exist"):
        list_source(tmp_path / "y.txt")


def test_open_source_by_kind(listed):
    path = listed("file,label\na.png,3\n")
    for spec in (f"csv:{path}", str(path)):
        assert records(open_source(spec)) == [Record("a.png", 3, b"a.png")]
    for spec in (f"folder:{path.with_suffix('')}", str(path.with_suffix(""))):
        assert [record.id for record in records(open_source(spec))] == [
            "a.png",
            "b.png",
            "sub/c.png",
        ]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(make(tmp_path, "set/a.png")))
    assert len(open_source("folder:~/set")) == 1


def test_unknown_kind():
    with pytest.raises(
        ValueError, match=r"'gs' in 'gs://bucket/x': use folder:PATH, csv:PATH, list:PATH"
    ):
        open_source("gs://bucket/x")


def test_colon_in_a_folder_name(tmp_path, monkeypatch):
    make(tmp_path / "my:set", "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("my:set")) == 1


def test_a_source_is_grains_and_pickles(tmp_path):
    source = folder_source(make(tmp_path, "a/1.png", "b/2.png"))
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    assert records(pickle.loads(pickle.dumps(source))) == records(source)


def test_file_that_goes_away(tmp_path):
    source = folder_source(make(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        source[0]


def test_real_labels(shared_data):
    imagenet = shared_data / "imagenet"
    labelled, flat = open_source(f"csv:{imagenet}/id_val.csv"), open_source(f"{imagenet}/id_val")
    assert (labelled.name, len(labelled)) == (flat.name, len(flat)) == ("id_val", 650)
    assert sorted(labelled.ids) == list(flat.ids)
    assert labelled[0].label == 472
    assert labelled[0].id == "ILSVRC2012_val_00000347.JPEG"
    assert set(flat.labels) == {-1}
    cifar = open_source(str(shared_data / "cifar10" / "test"))
    assert len(cifar) == 2000
    assert sorted(set(cifar.labels)) == list(range(10))
