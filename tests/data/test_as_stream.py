"""Every kind of data that `as_stream` takes, by the batches that come of it."""

import collections

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.data import array_stream, as_stream
from gradnorm_jax.data.preprocess import Preprocess, get_preprocess
from gradnorm_jax.data.schedule import BatchSchedule
from tests.data.files import ONE_PIXEL, MadeSource, first_pixel

IMAGES = np.random.default_rng(0).normal(size=(7, 4, 5)).astype(np.float32)
LABELS = np.arange(7) % 3
IDS = [f"image-{i}" for i in range(7)]
RAGGED = [slice(0, 2), slice(2, 2), slice(2, 6), slice(6, 7)]


def read(stream, size=4):
    """Inputs, labels and ids of all batches, all of which but the last must be full."""
    batches = list(stream.batches(BatchSchedule(size)))
    assert [batch.number for batch in batches] == list(range(len(batches)))
    assert all(len(batch.data) == len(batch.mask) == size for batch in batches)
    assert not batches[-1].mask.all()
    for batch in batches[:-1]:
        assert batch.mask.all()
    positions = np.concatenate([batch.positions for batch in batches])
    np.testing.assert_array_equal(positions, np.arange(len(positions)))
    masked = [batch.data[~batch.mask] for batch in batches]
    assert not np.concatenate(masked).any()
    return (
        np.concatenate([batch.data[batch.mask] for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        [each for batch in batches for each in batch.ids],
    )


class Restarting:
    """Its `__iter__` starts again, as that of loaders does."""

    def __init__(self, *elements):
        self.elements = elements

    def __iter__(self):
        yield from self.elements


class Tensor:
    """What tensors of other frameworks have in common."""

    def __init__(self, array):
        self._array = np.asarray(array)
        self.shape, self.ndim = self._array.shape, self._array.ndim

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype)

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return map(Tensor, self._array)


def pairs():
    return [(IMAGES[rows], LABELS[rows]) for rows in RAGGED]


def mappings():
    return [
        {"image": IMAGES[rows], "label": LABELS[rows], "id": np.array(IDS)[rows]} for rows in RAGGED
    ]


def pairs_of_one():
    return list(zip(IMAGES, LABELS.tolist(), strict=True))


def examples():
    return [{"image": x, "label": y} for x, y in pairs_of_one()]


KINDS = {
    "NumPy arrays": (IMAGES, LABELS),
    "JAX arrays": (jnp.asarray(IMAGES), jnp.asarray(LABELS)),
    "tensors of another framework": (Tensor(IMAGES), Tensor(LABELS)),
    "labels as a list": (IMAGES, LABELS.tolist()),
    "a mapping": {"image": IMAGES, "label": LABELS},
    "a mapping with the names of others": {"pixel_values": IMAGES, "labels": LABELS},
    "a list of ragged pairs": pairs(),
    "a list of lists": [[x, y] for x, y in pairs()],
    "a list of mappings": mappings(),
    "a list of tensors": [(Tensor(x), Tensor(y)) for x, y in pairs()],
    "a function that makes a generator": lambda: (pair for pair in pairs()),
    "a function that returns a list": pairs,
    "an object that starts again": Restarting(*pairs()),
    "single examples": examples(),
    "single pairs": pairs_of_one(),
    "single tensors": [{"image": Tensor(x), "label": Tensor(y)} for x, y in pairs_of_one()],
    "other mappings": [collections.UserDict(x) for x in mappings()],
    "Grain MapDataset": grain.MapDataset.source(examples()).batch(2),
    "Grain MapDataset of single examples": grain.MapDataset.source(examples()),
    "Grain IterDataset": grain.MapDataset.source(examples()).to_iter_dataset().batch(3),
    "Grain DataLoader": grain.DataLoader(
        data_source=examples(),
        sampler=grain.samplers.IndexSampler(7, grain.sharding.NoSharding(), num_epochs=1),
        operations=[grain.transforms.Batch(3)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4, 7, 20])
def test_every_kind_gives_the_same_batches(kind, size):
    stream = as_stream(KINDS[kind])
    for _ in range(2):
        images, labels, ids = read(stream, size)
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_array_equal(labels, LABELS)
        assert ids == (IDS if "mappings" in kind else [str(i) for i in range(7)])
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
    "data",
    [IMAGES, jnp.asarray(IMAGES), Tensor(IMAGES), [IMAGES[:3], IMAGES[3:]], {"image": IMAGES}],
    ids=["NumPy", "JAX", "tensor", "list", "mapping"],
)
def test_labels_are_unknown_where_none_are_given(data):
    images, labels, ids = read(as_stream(data))
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == [-1] * 7
    assert ids == list("0123456")


@pytest.mark.parametrize("as_loader", [False, True])
def test_a_mask_leaves_rows_out(as_loader):
    data = {"image": IMAGES, "label": LABELS, "id": IDS, "mask": [1, 0, 1, 1, 0, 1, 1]}
    images, labels, ids = read(as_stream([data] if as_loader else data))
    kept = [0, 2, 3, 5, 6]
    np.testing.assert_array_equal(images, IMAGES[kept])
    np.testing.assert_array_equal(labels, LABELS[kept])
    assert ids == [IDS[i] for i in kept]


def test_ids_may_be_bytes_and_numbers():
    assert read(as_stream([{"image": IMAGES[:2], "id": [b"a\xc3\xa4", b"b"]}]))[2] == ["aä", "b"]
    assert read(as_stream({"image": IMAGES[:2], "id": np.array([7, 3])}))[2] == ["7", "3"]


def test_positions_stand_for_ids_where_some_have_none():
    elements = [{"image": IMAGES[:2], "id": ["a", "b"]}, {"image": IMAGES[2:3]}]
    assert read(as_stream(elements))[2] == ["0", "1", "2"]


@pytest.mark.parametrize("shape", [(50,), (4, 4, 4, 1), (2, 3), (1,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.bool_])
def test_inputs_of_any_shape_and_type(shape, dtype):
    inputs = np.random.default_rng(1).integers(0, 2, (5, *shape)).astype(dtype)
    for data in (inputs, [inputs[:3], inputs[3:]]):
        found = read(as_stream(data), 2)[0]
        np.testing.assert_array_equal(found, inputs)
        assert found.dtype == dtype


def test_bfloat16():
    inputs = jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2)
    stream = as_stream(inputs)
    assert read(stream, 2)[0].dtype == jnp.bfloat16
    assert stream.identity() != as_stream(inputs + 1).identity()


def shade(value):
    return Image.new("RGB", (3, 2), (value, 0, 9))


def test_pictures_are_preprocessed_one_by_one():
    pictures = [shade(i) for i in range(5)]
    arrays = [np.asarray(picture) for picture in pictures]
    kinds = {
        "arrays": (np.stack(arrays), np.arange(5)),
        "single pictures": [{"image": x, "label": i} for i, x in enumerate(pictures)],
        "pairs of a picture and its label": list(zip(pictures, range(5), strict=True)),
        "batches of pictures": [(pictures[:2], [0, 1]), (pictures[2:], [2, 3, 4])],
        "batches of arrays": [(np.stack(arrays[:2]), [0, 1]), (np.stack(arrays[2:]), [2, 3, 4])],
    }
    for data in kinds.values():
        images, labels, _ = read(as_stream(data, ONE_PIXEL), 3)
        np.testing.assert_array_equal(images[:, 0, 0], [[i, 0, 9] for i in range(5)])
        assert images.dtype == np.uint8
        assert labels.tolist() == [0, 1, 2, 3, 4]
    assert read(as_stream(pictures, ONE_PIXEL), 3)[1].tolist() == [-1] * 5


def test_pictures_of_several_sizes():
    sizes = [(3, 2), (4, 2), (3, 9), (1, 1), (3, 2)]
    pictures = [Image.new("RGB", size, (i, 0, 0)) for i, size in enumerate(sizes)]
    preprocess = get_preprocess("squash=4,mean=none,std=none")
    for data in (pictures, [pictures[:3], pictures[3:]], [{"image": x} for x in pictures]):
        images, _, _ = read(as_stream(data, preprocess), 3)
        assert images.shape == (5, 4, 4, 3)
        np.testing.assert_array_equal(images[:, 1, 2, 0], range(5))
        with pytest.raises(ValueError, match=r"must have one shape.*: give a Preprocess for imag"):
            read(as_stream(data), 3)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (1, 3, 1), (2, 1, 3), (1, 3, 3)])
def test_grey_and_narrow_arrays_are_pictures(shape):
    arrays = np.full((4, *shape), 7, np.uint8)
    images = read(as_stream(arrays, ONE_PIXEL))[0]
    assert images.shape == (4, 1, 1, 3)
    assert (images == 7).all()


def test_pictures_of_other_modes_are_converted_like_files():
    palette = Image.fromarray(np.array([[1]], np.uint8))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette = palette.convert("P") if palette.mode != "P" else palette
    pictures = {
        "P": (palette, [9, 8, 7]),
        "RGBA": (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), [1, 2, 3]),
        "1": (Image.new("1", (1, 1), 1), [255] * 3),
        "I;16": (Image.fromarray(np.array([[0x1234]], np.uint16)), [0x12] * 3),
        "L": (Image.new("L", (1, 1), 5), [5] * 3),
    }
    for mode, (picture, expected) in pictures.items():
        assert picture.mode == mode
        images = read(as_stream([picture], ONE_PIXEL))[0]
        assert images.ravel().tolist() == expected, mode


def test_floats_are_the_networks_input_whatever_the_preprocess():
    np.testing.assert_array_equal(read(as_stream(IMAGES, ONE_PIXEL))[0], IMAGES)


def test_files_by_name_and_sources(tmp_path):
    for i in range(3):
        shade(i).save(tmp_path / f"{i}.png")
    for data in (tmp_path, str(tmp_path), f"folder:{tmp_path}"):
        images, labels, ids = read(as_stream(data, ONE_PIXEL), 2)
        np.testing.assert_array_equal(images[:, 0, 0, 0], range(3))
        assert labels.tolist() == [-1] * 3
        assert ids == ["0.png", "1.png", "2.png"]
    images, labels, ids = read(as_stream(MadeSource(3), ONE_PIXEL), 2)
    np.testing.assert_array_equal(images[:, 0, 0, 0], range(3))
    assert (labels.tolist(), ids) == ([0, 1, 2], IDS[:3])


def test_a_stream_stays_as_it_is():
    stream = array_stream(IMAGES)
    assert as_stream(stream, ONE_PIXEL) is stream


def test_arrays_are_known_by_their_content():
    identity = as_stream((IMAGES, LABELS)).identity()
    assert identity == as_stream((jnp.asarray(IMAGES), LABELS.astype(np.int32))).identity()
    assert identity["inputs"] == 7
    for other in (IMAGES + 1, IMAGES[:, ::-1], IMAGES.astype(np.float64), IMAGES[:6]):
        labels = LABELS[: len(other)]
        assert as_stream((other, labels)).identity() != identity
    assert as_stream((IMAGES, LABELS[::-1])).identity() != identity
    assert as_stream(IMAGES).identity() != identity
    ids = [as_stream({"image": IMAGES, "id": ids}).identity() for ids in (IDS, IDS[::-1])]
    assert ids[0] != ids[1]


def test_loaders_are_known_by_their_name():
    assert as_stream(pairs(), name="a").identity() == {"stream": "a"}
    assert as_stream(pairs()).length is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([IMAGES]), r"list_iterator can be read only once: give a function that makes a new"),
        ((x for x in [IMAGES]), r"generator can be read only once: .* lambda: iter\(loader\)"),
        (7, r"cannot read data from a int: give an array \[N, ...\], \(images, labels\), a folder"),
        (None, "cannot read data from a NoneType"),
        (np.zeros(3), r"images must be an array \[N, ...\], got shape \(3,\)"),
        ((IMAGES, LABELS[:6]), r"one class per input, \[7\], got \(6,\)"),
        ((IMAGES, LABELS[:, None]), r"one class per input, \[7\], got \(7, 1\)"),
        ((IMAGES, LABELS / 2), r"labels must be integers \(class numbers\), got float64"),
        ((IMAGES, np.eye(7)), r"one class per input, \[7\], got \(7, 7\)"),
        ({"train": IMAGES, "test": IMAGES}, r"called 'image', got only \['test', 'train'\]"),
        ({"image": IMAGES, "mask": [True]}, r"whether it is one, \[7\], got \(1,\)"),
        ("nowhere/at/all", "image files .* need a Preprocess .* got preprocess=None"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(data, message):
    with pytest.raises(ValueError, match=message):
        as_stream(data)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"x_ray": IMAGES}, r"a batch must have an entry called 'image', got only \['x_ray'\]"),
        ((IMAGES, LABELS, LABELS), r"must be an array, \(images, labels\) or a mapping, got 3"),
        ((IMAGES, LABELS[:2]), r"one class per input, \[7\], got \(2,\)"),
        ({"image": IMAGES, "mask": np.ones((7, 1))}, r"\[7\], got \(7, 1\)"),
    ],
)
def test_what_a_loader_must_not_yield(element, message):
    with pytest.raises(ValueError, match=message):
        read(as_stream([element]))


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8), np.uint8)], ids=["CHW", "flat"]
)
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(ValueError, match=r"must be uint8 arrays \[H, W\], .* got uint8\["):
        read(as_stream(array, ONE_PIXEL))


@pytest.mark.parametrize("data", [[], lambda: iter([]), Restarting()])
def test_a_loader_of_nothing_gives_no_batch(data):
    assert list(as_stream(data).batches(BatchSchedule(3))) == []


@pytest.mark.parametrize("data", [IMAGES[:0], [IMAGES[:0]], [([], [])], [{"image": []}]])
def test_no_inputs_are_one_empty_batch(data):
    (batch,) = as_stream(data).batches(BatchSchedule(3))
    assert not batch.mask.any()
    assert len(batch.ids) == 0


def test_only_what_is_taken_is_preprocessed():
    seen = []

    def transform(image):
        seen.append(image.getpixel((0, 0))[0])
        return first_pixel(image)

    preprocess = Preprocess("seen", 1, transform, (0, 0, 0), (1, 1, 1))
    pictures = [shade(i) for i in range(9)]
    stream = as_stream([pictures[:4], pictures[4:]], preprocess)
    schedule = BatchSchedule(2, 1, process=1, processes=2)
    assert [batch.number for batch in stream.batches(schedule)] == [1, 3]
    assert seen == [2, 3, 6, 7]


def test_torch():
    torch = pytest.importorskip("torch", reason="reads loaders of PyTorch")
    dataset = torch.utils.data.TensorDataset(torch.tensor(IMAGES), torch.tensor(LABELS))
    for data in (
        torch.utils.data.DataLoader(dataset, batch_size=3),
        (torch.tensor(IMAGES), torch.tensor(LABELS)),
    ):
        images, labels, _ = read(as_stream(data))
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_array_equal(labels, LABELS)


def test_tensorflow():
    tf = pytest.importorskip("tensorflow", reason="reads data sets of TensorFlow")
    dataset = tf.data.Dataset.from_tensor_slices({"image": IMAGES, "label": LABELS, "id": IDS})
    for data in (dataset, dataset.batch(3)):
        images, labels, ids = read(as_stream(data))
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_array_equal(labels, LABELS)
        assert ids == IDS


def test_hugging_face():
    datasets = pytest.importorskip("datasets", reason="reads data sets of Hugging Face")
    pictures = [shade(i) for i in range(5)]
    dataset = datasets.Dataset.from_dict(
        {"image": pictures, "label": list(range(5))},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    images, labels, _ = read(as_stream(dataset, ONE_PIXEL), 3)
    np.testing.assert_array_equal(images[:, 0, 0, 0], range(5))
    assert labels.tolist() == list(range(5))
