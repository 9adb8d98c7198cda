import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

import gradnorm_jax as gj
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source import Source


def encode(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


PIXELS = get_preprocess("crop=4,mean=none,std=none")
IMAGES = [encode(value) for value in range(5)]


def write(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def test_images_labels_and_ids(tmp_path):
    path = write(tmp_path / "a.parquet", image=IMAGES, label=[0, 1, None, 3, -1], id=[*"vwxyz"])
    source = open_source(path)
    assert isinstance(source, Source)
    assert [source[i].label for i in range(5)] == [0, 1, -1, 3, -1]
    assert [source[i].id for i in range(5)] == [*"vwxyz"]
    assert source[3].data == IMAGES[3]
    assert source.fingerprint() == open_source(f"parquet:{path}").fingerprint()
    other = write(tmp_path / "b.parquet", image=IMAGES[::-1], label=[0, 1, 2, 3, 4])
    assert open_source(other).fingerprint() != source.fingerprint()


def test_a_folder_of_hugging_faces(tmp_path):
    images = [{"bytes": data, "path": None} for data in IMAGES]
    write(tmp_path / "1.parquet", img=images[3:], fine_label=[3, 4], coarse_label=[0, 0])
    write(tmp_path / "0.parquet", img=images[:3], fine_label=[0, 1, 2], coarse_label=[0, 0, 0])
    stream = gj.as_stream(open_source(f"parquet:{tmp_path}"), PIXELS)
    (batch,) = stream.batches(BatchSchedule(8))
    assert batch.ids == [*"01234"]
    np.testing.assert_array_equal(batch.labels, range(5))
    np.testing.assert_array_equal(batch.data[:5, 0, 0, 0], range(5))


def test_an_image_that_is_none_is_left_out_by_name(tmp_path):
    path = write(tmp_path / "a.parquet", image=[IMAGES[0], None, b"no image"])
    (batch,) = gj.as_stream(open_source(path), PIXELS).batches(BatchSchedule(8))
    assert batch.ids == ["0"]
    assert [(each.id, each.position) for each in batch.excluded] == [("1", 1), ("2", 2)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": IMAGES}, "has no column 'image' but 'picture'"),
        ({"image": [1, 2]}, "has images of type int64"),
        ({"image": IMAGES[:1], "label": ["cat"]}, "has labels of type string"),
        ({"image": IMAGES[:1], "label": [-2]}, "has the label -2"),
        ({"image": pa.array([], pa.binary())}, "holds no image"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        open_source(write(tmp_path / "a.parquet", **columns))


def test_no_file_and_no_parquet(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Parquet file at"):
        open_source(f"parquet:{tmp_path}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not a whole Parquet file"):
        open_source(str(tmp_path / "a.parquet"))
