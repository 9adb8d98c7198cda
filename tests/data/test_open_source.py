import pyarrow
import pyarrow.parquet
import pytest

from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.source import Record
from tests.data.files import make, records


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


def test_a_source_says_how_to_open_it_again(listed, tmp_path, monkeypatch):
    path = listed("file,label\na.png,3\n")
    listing = tmp_path / "list.txt"
    listing.write_text("a.png 3\n")
    parquet = tmp_path / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"a.png"], "label": [3]}), parquet)
    folder = path.with_suffix("")
    monkeypatch.chdir(folder.parent)
    relative = [f"csv:{path.name}", folder.name, f"list:{listing}@{folder.name}", str(parquet)]
    sources = [open_source(spec) for spec in relative]
    expected = [(source.name, records(source)) for source in sources]
    monkeypatch.chdir("/")
    again = [open_source(source.spec) for source in sources]
    assert [(source.name, records(source)) for source in again] == expected


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
