import pytest

from gradnorm_jax.data.list_source import csv_source, list_source
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.source import Record
from tests.data.files import make, records


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
