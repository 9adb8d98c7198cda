"""Folders and lists as users really have them, and as nobody should."""

import io
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gradnorm_jax.cli.evaluate import EvaluateOptions, _name_data
from gradnorm_jax.data.folder_source import folder_source
from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.list_source import csv_source, list_source
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import Preprocess, get_preprocess
from gradnorm_jax.data.tfds_source import tfds_source
from tests.data.files import make, records
from tests.hostile import an_answer_or_a_sentence


@pytest.mark.parametrize("kind", ["fifo", "nowhere", "circle"])
def test_only_regular_files_are_read(tmp_path, kind):
    make(tmp_path, "a.png", "b/c.png")
    if kind == "fifo":
        os.mkfifo(tmp_path / "x.png")
    else:
        (tmp_path / "x.png").symlink_to("nothing.png" if kind == "nowhere" else "x.png")
    source = folder_source(tmp_path)
    assert source.ids == ("a.png", "b/c.png")
    assert source.ignored == ("x.png",)
    (tmp_path / "list.csv").write_text("file\na.png\nx.png\n")
    if kind != "circle":
        with pytest.raises(FileNotFoundError, match=r"do not exist in .*: x\.png"):
            csv_source(tmp_path / "list.csv")


def test_links_to_files_and_folders_are_followed(tmp_path):
    make(tmp_path / "there", "b/1.png")
    make(tmp_path / "here", "a.png")
    (tmp_path / "here" / "b").symlink_to(tmp_path / "there" / "b")
    (tmp_path / "here" / "c.png").symlink_to(tmp_path / "there" / "b" / "1.png")
    assert folder_source(tmp_path / "here").ids == ("a.png", "b/1.png", "c.png")


@pytest.mark.parametrize("how", ["content", "time", "label", "copy"])
def test_any_changed_file_is_another_source(tmp_path, how):
    files = [f"{k}/{i:03}.png" for k in "ab" for i in range(100)]
    make(tmp_path / "set", *files)
    before = folder_source(tmp_path / "set").fingerprint()
    assert folder_source(f"{tmp_path}/set/../set/").fingerprint() == before
    changed = tmp_path / "set" / files[137]
    if how == "content":
        stat = changed.stat()
        changed.write_bytes(b"something else")
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "time":
        os.utime(changed, ns=(0, 0))
    elif how == "label":
        (tmp_path / "set" / "0").mkdir()
    else:
        shutil.copytree(tmp_path / "set", tmp_path / "kept")
        assert folder_source(tmp_path / "kept").fingerprint() == before
        shutil.copytree(tmp_path / "set", tmp_path / "set2", copy_function=shutil.copy)
        (tmp_path / "set").rename(tmp_path / "old")
        (tmp_path / "set2").rename(tmp_path / "set")
    assert folder_source(tmp_path / "set").fingerprint() != before


def test_folders_tell_how_many_classes_there_are(tmp_path):
    assert folder_source(make(tmp_path / "three", "a/1.png", "b/1.png", "c/1.png")).classes == 3
    assert folder_source(make(tmp_path / "flat", "1.png", "2.png")).classes is None
    (tmp_path / "three.csv").write_text("file,label\na/1.png,0\n")
    assert csv_source(tmp_path / "three.csv").classes is None


@pytest.mark.parametrize(
    "header", ["file,label", "file, label", "File,LABEL", " files ,\tlabels ", "note,labels,file"]
)
def test_any_spelling_of_the_header(listed, header):
    entry = "x, a.png" if header.startswith("note") else "a.png"
    row = f"x, 7,{entry.split()[-1]}" if header.startswith("note") else f"{entry}, 7"
    (record,) = records(csv_source(listed(f"{header}\n{row}\n")))
    assert (record.id, record.label) == ("a.png", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label,labels\na.png,1,2\n", "two columns that may be 'file' or 'label', 'file'"),
        ("file,File\na.png,b.png\n", "two columns that may be"),
        ("file,label\na.png,1,2\n", "line 2 has 3 entries, but there are 2 columns: put quotes"),
        ("file\na.png\nsub/../a.png\n", "lists a.png more than once"),
        ("file\na.png\n../set/a.png\n", "lists a.png more than once"),
    ],
)
def test_csv_files_that_are_misunderstood_easily(listed, text, message):
    with pytest.raises(ValueError, match=message):
        csv_source(listed(text))


def test_an_absolute_path_is_another_spelling_too(listed):
    path = listed("")
    path.write_text(f"file\na.png\n{path.with_suffix('')}/a.png\n")
    with pytest.raises(ValueError, match=r"lists a\.png more than once"):
        csv_source(path)


def test_a_csv_file_given_as_a_list(tmp_path):
    (tmp_path / "x.txt").write_text("path, label\na.png, 3\n")
    with pytest.raises(ValueError, match=r"seems to be a CSV file: give it as csv:.*/x\.txt"):
        list_source(tmp_path / "x.txt")


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_images_of_floats_are_refused(scale):
    with io.BytesIO() as file:
        Image.fromarray(np.full((3, 3), scale, np.float32)).save(file, "TIFF")
        with pytest.raises(BadImage, match="floating-point numbers of unknown scale; use 8 or 16"):
            decode_rgb(file.getvalue())


CSV = st.text(alphabet='filelabel,,"\n\r -109./\x00é', max_size=60)


@given(text=st.one_of(CSV, CSV.map(lambda text: f"file,label\n{text}"), st.binary(max_size=60)))
@settings(max_examples=300, deadline=5000)
@pytest.mark.parametrize(("read", "ending"), [(csv_source, "csv"), (list_source, "txt")])
def test_any_list_is_read_or_refused(tmp_path_factory, read, ending, text):
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (path.parent / "1.l").write_bytes(b"")
    with an_answer_or_a_sentence(path):
        assert len(read(path)) > 0


WORDS = ("resize", "crop", "squash", "mean", "std", "=", ",", "/", "32", "0", "-1", "half", "nan")
PREPROCESS = st.lists(st.sampled_from((*WORDS, "none", "1e999", "²", " ", "9" * 30, ":"))).map(
    "".join
)


@given(spec=st.one_of(st.text(max_size=30), PREPROCESS))
@settings(max_examples=500, deadline=5000)
def test_any_preprocessing_is_read_or_refused(spec):
    with an_answer_or_a_sentence():
        assert isinstance(get_preprocess(spec), Preprocess)


SPECS = st.lists(
    st.sampled_from(("tfds", "csv", "folder", ":", "=", "@", "a", "/", "\0", ".", " "))
)


@given(spec=st.one_of(st.text(max_size=30), SPECS.map("".join)))
@settings(max_examples=500, deadline=5000)
def test_any_ood_set_is_named_or_refused(spec):
    with an_answer_or_a_sentence():
        assert len(_name_data(EvaluateOptions(out="out", id="id", ood=((spec,),)))) == 2


# Without slashes: a whole disk is listed for as long as it takes.
NAMES = st.lists(
    st.sampled_from(("tfds", "csv", "list", "folder", ":", "=", "@", "a", "~", ".", "\0"))
)


@given(
    spec=st.one_of(st.text(st.characters(exclude_characters="/"), max_size=30), NAMES.map("".join))
)
@settings(max_examples=300, deadline=5000)
def test_any_source_is_opened_or_refused(tmp_path_factory, spec):
    folder = tmp_path_factory.getbasetemp() / "empty" / "below"
    folder.mkdir(parents=True, exist_ok=True)
    with an_answer_or_a_sentence(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        assert len(open_source(spec, folder)) > 0


def test_a_home_that_nobody_has():
    with pytest.raises(FileNotFoundError, match="the image folder ~nobody-at-all does not exist"):
        folder_source("~nobody-at-all")


def test_any_prepared_data_set_is_opened_or_refused(tmp_path):
    for spec in ("", ":", "a:", "a:b:c", "a/b/c", "..", "a:train[:", "\0", "é" * 300):
        with an_answer_or_a_sentence():
            tfds_source(spec, tmp_path)
