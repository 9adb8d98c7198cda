import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.data import images as images_module
from gradnorm_jax.data.images import BadImage
from gradnorm_jax.data.preprocess import (
    PREPROCESSES,
    Preprocess,
    centre_crop,
    get_preprocess,
    resize_short_side,
    scale,
    to_network_input,
)

# Width and height: even, odd, exact, off by one, smaller than the crop in one or both, extreme.
SIZES = [
    *((w, h) for w in (223, 224, 225, 226, 227) for h in (223, 224, 227)),
    *((256, 256), (256, 300), (300, 256), (500, 375), (375, 500), (333, 499), (499, 334)),
    *((1, 1), (1, 2), (3, 1), (2, 101), (101, 2), (31, 33), (1, 225), (1000, 7), (640, 479)),
]


def noise(width, height):
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def torchvision_resize(image, size):
    """Transcribes the published rule: the shorter edge becomes `size`, the other is truncated."""
    w, h = image.size
    if w <= h:
        return image.resize((size, int(size * h / w)), Image.Resampling.BILINEAR)
    return image.resize((int(size * w / h), size), Image.Resampling.BILINEAR)


def torchvision_center_crop(image, size):
    """Transcribes the published rule on arrays: pad both sides if need be, then crop."""
    x = np.asarray(image)
    h, w = x.shape[:2]
    if h < size or w < size:
        down, across = max(size - h, 0), max(size - w, 0)
        x = np.pad(x, ((down // 2, (down + 1) // 2), (across // 2, (across + 1) // 2), (0, 0)))
        h, w = x.shape[:2]
    top, left = round((h - size) / 2.0), round((w - size) / 2.0)
    return x[top : top + size, left : left + size]


EXPECTED = {
    "bit480": lambda image: np.asarray(image.resize((480, 480), Image.Resampling.BILINEAR)),
    "bit32": lambda image: np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)),
    "crop224": lambda image: torchvision_center_crop(image, 224),
    "imagenet224": lambda image: torchvision_center_crop(torchvision_resize(image, 256), 224),
}


def test_the_table_is_covered():
    assert PREPROCESSES.keys() == EXPECTED.keys()
    assert all(name == preprocess.name for name, preprocess in PREPROCESSES.items())


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_torchvision_bit_for_bit(name, size):
    preprocess, image = PREPROCESSES[name], noise(*size)
    pixels = preprocess.pixels(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (preprocess.size, preprocess.size, 3)
    np.testing.assert_array_equal(pixels, EXPECTED[name](image))


@pytest.mark.parametrize(
    # 27 - 24 = 3 and 29 - 24 = 5 pixels to lose: 1.5 rounds to 2, and 2.5 to 2 as well.
    ("length", "size", "first"),
    [(24, 24, 0), (25, 24, 0), (26, 24, 1), (27, 24, 2), (29, 24, 2), (31, 24, 4)],
)
def test_odd_crops_round_halves_to_even(length, size, first):
    column = Image.fromarray(np.arange(length, dtype=np.uint8)[None, :].repeat(length, axis=0))
    assert np.asarray(centre_crop(column.convert("RGB"), size))[0, 0, 0] == first


def test_padding_puts_the_odd_pixel_last():
    padded = np.asarray(centre_crop(Image.new("RGB", (1, 2), (7, 7, 7)), 4))[..., 0]
    np.testing.assert_array_equal(padded, [[0, 0, 0, 0], [0, 7, 0, 0], [0, 7, 0, 0], [0, 0, 0, 0]])


def test_resize_is_antialiased():
    # Without antialiasing a fine chequerboard aliases; with it, it turns into its mean.
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = PREPROCESSES["bit32"].pixels(Image.fromarray(board).convert("RGB"))
    assert np.ptp(pixels[2:-2, 2:-2]) <= 1
    assert abs(int(pixels[16, 16, 0]) - 127) <= 1


def test_an_image_too_elongated_to_resize_is_refused():
    with pytest.raises(BadImage, match=r"1 x 4000 pixels is too elongated"):
        resize_short_side(Image.new("RGB", (1, 4000)), 256)
    assert resize_short_side(Image.new("RGB", (1, 100)), 16).size == (16, 1600)


ALL_VALUES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)


@pytest.mark.parametrize("name", EXPECTED)
def test_scale_is_the_formula(name):
    preprocess = PREPROCESSES[name]
    mean, std = (np.array(x, np.float32) for x in (preprocess.mean, preprocess.std))
    # float32 step by step, as ToTensor and Normalize compute it.
    expected = (ALL_VALUES.astype(np.float32) / np.float32(255) - mean) / std
    rounding = 2 * np.spacing(np.float32(1 / min(preprocess.std)))
    for function in (scale, jax.jit(scale, static_argnums=1)):
        scaled = function(jnp.asarray(ALL_VALUES), preprocess)
        assert scaled.dtype == jnp.float32
        np.testing.assert_allclose(scaled, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("name", ["bit480", "bit32", "crop224"])
def test_half_mean_and_std_fill_minus_one_to_one(name):
    scaled = scale(jnp.asarray(ALL_VALUES), PREPROCESSES[name])
    assert (scaled.min(), scaled.max()) == (-1, 1)


def test_imagenet_statistics():
    black = scale(jnp.zeros((1, 1, 1, 3), jnp.uint8), PREPROCESSES["imagenet224"])
    np.testing.assert_allclose(
        black.ravel(), [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6
    )


def test_static_argument_is_traced_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def count(pixels, preprocess):
        traces.append(preprocess.name)
        return scale(pixels, preprocess)

    for name in ("bit32", "bit480", "bit32"):
        count(ALL_VALUES, get_preprocess(name))
    assert traces == ["bit32", "bit480"]


@pytest.mark.parametrize("name", EXPECTED)
def test_pickles(name):
    image = noise(50, 40)
    copy = pickle.loads(pickle.dumps(PREPROCESSES[name]))
    np.testing.assert_array_equal(copy.pixels(image), PREPROCESSES[name].pixels(image))


def test_a_preprocessing_of_ones_own():
    mine = Preprocess("mine", 5, functools.partial(centre_crop, size=5), (0, 0, 0), (1, 1, 1))
    assert mine.pixels(noise(9, 9)).shape == (5, 5, 3)


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"'bit48'.*bit480, bit32, crop224, imagenet224"):
        get_preprocess("bit48")


COMPOSED = {
    "resize=256,crop=224,mean=imagenet,std=imagenet": EXPECTED["imagenet224"],
    "squash=32,mean=half,std=half": EXPECTED["bit32"],
    "crop=224,mean=none,std=none": EXPECTED["crop224"],
    "resize=20,crop=16,mean=cifar10,std=cifar10": lambda image: torchvision_center_crop(
        torchvision_resize(image, 20), 16
    ),
    "squash=40,crop=36,mean=cifar100,std=cifar100": lambda image: torchvision_center_crop(
        image.resize((40, 40), Image.Resampling.BILINEAR), 36
    ),
}


@pytest.mark.parametrize("spec", COMPOSED)
@pytest.mark.parametrize("size", [(500, 375), (31, 33), (257, 224)], ids=str)
def test_composed_pixels_equal_torchvision(spec, size):
    preprocess = get_preprocess(spec)
    pixels = preprocess.pixels(noise(*size))
    np.testing.assert_array_equal(pixels, COMPOSED[spec](noise(*size)))
    assert pixels.shape == (preprocess.size, preprocess.size, 3)
    assert preprocess.name == spec


def test_composed_in_any_order_and_with_spaces():
    first = get_preprocess("resize=20,crop=16,mean=0.1/0.2/0.3,std=1/2/4")
    second = get_preprocess(" std=1/2/4, mean=0.1/0.2/0.3 ,resize = 20,crop=16 ")
    assert (first.mean, first.std) == (second.mean, second.std) == ((0.1, 0.2, 0.3), (1, 2, 4))
    image = noise(40, 30)
    np.testing.assert_array_equal(first.pixels(image), second.pixels(image))
    # Steps are taken as they are written.
    other = get_preprocess("crop=16,squash=20,mean=none,std=none")
    assert other.pixels(image).shape == (20, 20, 3)


def test_equal_specs_are_equal_and_pickle():
    spec = "resize=20,crop=16,mean=imagenet,std=imagenet"
    preprocess = get_preprocess(spec)
    copy = pickle.loads(pickle.dumps(preprocess))
    np.testing.assert_array_equal(copy.pixels(noise(40, 30)), preprocess.pixels(noise(40, 30)))
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def count(pixels, preprocess):
        traces.append(1)
        return scale(pixels, preprocess)

    for _ in range(3):
        count(ALL_VALUES, get_preprocess(spec))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resize=256,mean=half,std=half", "must end with crop=SIZE or squash=SIZE"),
        ("mean=half,std=half", "must end with crop=SIZE or squash=SIZE"),
        ("crop=224", "must give both mean and std"),
        ("crop=224,mean=half", "must give both mean and std"),
        ("crop=224,crop=32,mean=half,std=half", "crop is given twice"),
        ("crop=224,mean=half,mean=half,std=half", "mean is given twice"),
        ("crop=0,mean=half,std=half", "cannot read 'crop=0' .* with squash=SIZE"),
        ("crop=2.5,mean=half,std=half", "cannot read 'crop=2.5'"),
        ("crop=-1,mean=half,std=half", "cannot read 'crop=-1'"),
        ("crop,mean=half,std=half", "cannot read 'crop'"),
        ("flip=1,crop=2,mean=half,std=half", "cannot read 'flip=1'"),
        ("crop=2,mean=lsun,std=half", "mean must be one of half, imagenet, .*, got 'lsun' in"),
        (
            "crop=2,mean=half,std=1/2",
            "std must be one of .* three numbers joined by '/', got '1/2'",
        ),
        ("crop=2,mean=half,std=0/1/1", r"std must be positive, got \(0.0, 1.0, 1.0\)"),
        ("crop=2,mean=nan/1/1,std=half", "mean must be a number for each of 3 channels"),
        ("crop=2,mean=half,std=inf/1/1", "std must be a number for each of 3 channels"),
        ("resize=20,crop=16,squash=,mean=half,std=half", "cannot read 'squash='"),
    ],
)
def test_a_composition_that_cannot_be_read(spec, message):
    with pytest.raises(ValueError, match=message):
        get_preprocess(spec)


def test_by_reference(monkeypatch):
    monkeypatch.setattr(images_module, "mine", PREPROCESSES["bit32"], raising=False)
    assert get_preprocess("gradnorm_jax.data.images:mine") is PREPROCESSES["bit32"]
    with pytest.raises(ValueError, match="images:decode_rgb must be a Preprocess, got function"):
        get_preprocess("gradnorm_jax.data.images:decode_rgb")
    with pytest.raises(ValueError, match=r"images:no' names nothing"):
        get_preprocess("gradnorm_jax.data.images:no")
    with pytest.raises(ValueError, match="there is no module 'nowhere' for 'nowhere:it'"):
        get_preprocess("nowhere:it")


VALID = {
    "name": "mine",
    "size": 4,
    "transform": functools.partial(centre_crop, size=4),
    "mean": (0.5, 0.5, 0.5),
    "std": (1, 1, 1),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be a positive number of pixels, got 0"),
        ({"size": 2.5}, "size must be a positive number of pixels, got 2.5"),
        ({"size": "4"}, "size must be a positive number of pixels, got '4'"),
        ({"size": (4, 5)}, r"size must be a positive number of pixels, got \(4, 5\)"),
        ({"mean": (0.5, 0.5)}, r"mean must be a number for each of 3 channels, got \(0.5, 0.5\)"),
        ({"mean": ("a", 1, 1)}, "mean must be a number for each of 3 channels"),
        ({"mean": (float("nan"), 1, 1)}, "mean must be a number for each of 3 channels"),
        ({"mean": 0.5}, "mean must be a number for each of 3 channels, got 0.5"),
        ({"std": None}, "std must be a number for each of 3 channels, got None"),
        ({"std": (1, 0, 1)}, r"std must be positive, got \(1, 0, 1\)"),
        ({"std": (1, 1, -1)}, "std must be positive"),
        ({"transform": None}, "transform must be a function of an image, got None"),
    ],
)
def test_a_preprocess_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{**VALID, **changes})


def test_lists_and_arrays_become_tuples():
    preprocess = Preprocess(**{**VALID, "mean": [0.1, 0.2, 0.3], "std": np.ones(3)})
    same = Preprocess(**{**VALID, "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)})
    assert preprocess == same
    assert hash(preprocess) == hash(same)


@pytest.mark.parametrize(
    ("transform", "found"),
    [
        (lambda image: image, r"uint8\[9, 9, 3\]"),
        (lambda image: image.resize((4, 5)), r"uint8\[5, 4, 3\]"),
        (lambda image: image.resize((4, 4)).convert("L"), r"uint8\[4, 4\]"),
        (lambda image: np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]"),
    ],
)
def test_a_transform_that_makes_something_else(transform, found):
    preprocess = Preprocess(**{**VALID, "transform": transform})
    with pytest.raises(
        ValueError, match=rf"of mine must make RGB images of 4 x 4 pixels, got {found}"
    ):
        preprocess.pixels(noise(9, 9))


def test_what_devices_do():
    preprocess = PREPROCESSES["bit32"]
    pixels = jnp.full((1, 2, 2, 3), 255, jnp.uint8)
    np.testing.assert_array_equal(to_network_input(pixels, preprocess), np.ones((1, 2, 2, 3)))
    floats = jnp.full((1, 5), 7.0)
    assert to_network_input(floats, preprocess) is floats
    assert to_network_input(floats, None) is floats
    np.testing.assert_array_equal(to_network_input(floats, lambda x: 2 * x), np.full((1, 5), 14.0))
