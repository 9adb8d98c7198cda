import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gradnorm_jax.data.images import BadImage, decode_rgb

GRADIENT = np.linspace(0, 255, 24 * 36 * 3).reshape(24, 36, 3).astype(np.uint8)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth, colour_type, rows):
    """A PNG file from its parts, for what Pillow does not write."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


def decode(data):
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back(kind):
    np.testing.assert_array_equal(decode(encode(Image.fromarray(GRADIENT), kind)), GRADIENT)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_back_as_pillow_reads_them(kind):
    data = encode(Image.fromarray(GRADIENT), kind)
    np.testing.assert_array_equal(
        decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_grey_is_repeated():
    grey = GRADIENT[..., 0]
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, axis=-1)
    )


def test_one_bit():
    image = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(decode(encode(image, "PNG"))[0], [[255] * 3, [0] * 3])


def test_cmyk_jpeg_by_hand():
    # Ink of 0 is white, of 255 black: R = 255 - C where there is no black ink.
    image = Image.new("CMYK", (16, 16), (200, 100, 0, 0))
    np.testing.assert_allclose(
        decode(encode(image, "JPEG", quality=100))[8, 8], [55, 155, 255], atol=2
    )


def test_alpha_is_dropped_not_blended():
    rgba = np.dstack([GRADIENT, np.zeros((24, 36), np.uint8)])
    np.testing.assert_array_equal(decode(encode(Image.fromarray(rgba), "PNG")), GRADIENT)


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80\xff"])
def test_palette(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode=None)
    image.putpalette([255, 0, 0, 0, 255, 0, 9, 8, 7])
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(encode(image, "PNG", **options))
    np.testing.assert_array_equal(pixels, [[[255, 0, 0], [0, 255, 0], [9, 8, 7]]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_the_high_byte(kind):
    grey = np.array([[0, 255, 256, 511, 32768, 65535]], np.uint16)
    pixels = decode(encode(Image.fromarray(grey), kind))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 1, 128, 255])


def test_big_endian_sixteen_bit_grey():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 256, 65535))
    np.testing.assert_array_equal(decode(encode(image, "TIFF"))[0, :, 0], [1, 255])


def test_sixteen_bit_grey_and_sixteen_bit_colour_agree():
    values = (0, 255, 256, 511, 32767, 32768, 65280, 65535)
    grey = png(8, 1, 16, 0, [struct.pack(">8H", *values)])
    colour = png(8, 1, 16, 2, [struct.pack(">24H", *np.repeat(values, 3).tolist())])
    np.testing.assert_array_equal(decode(grey), decode(colour))


def test_thirty_two_bit_values_beyond_sixteen_saturate():
    image = Image.fromarray(np.array([[-5, 65535, 65536, 2**31 - 1]], np.int32))
    np.testing.assert_array_equal(decode(encode(image, "TIFF"))[0, :, 0], [0, 255, 255, 255])


def test_one_pixel():
    np.testing.assert_array_equal(
        decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")), [[[1, 2, 3]]]
    )


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0, 0] == 10


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode(encode(Image.fromarray(GRADIENT), "JPEG", exif=exif)).shape == (24, 36, 3)


NOISE = encode(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG"
)
BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is not an image\n", "not an image of a known format"),
    "jpeg cut in half": (NOISE[: len(NOISE) // 2], "truncated"),
    "jpeg without its last bytes": (NOISE[:-40], "truncated"),
    "jpeg cut in its header": (NOISE[:100], "cannot be decoded"),
    "jpeg of four bytes": (NOISE[:4], "or its header is cut"),
    "png without pixels": (png(8, 8, 8, 0, []), "truncated"),
    "bomb": (png(30000, 30000, 1, 0, []), "decompression bomb"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_bad_image_says_why_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        decode_rgb(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_a_damaged_file_is_read_or_refused(kind):
    rng = np.random.default_rng(0)
    data = encode(Image.fromarray(GRADIENT), kind)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            damaged[position] = rng.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                decode(bytes(damaged))
            except BadImage as error:
                assert str(error)  # noqa: PT017 - either outcome is right


def test_every_real_image_is_read(shared_data):
    for path in sorted((shared_data / "imagenet" / "id_val").iterdir())[:20]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(
                decode(path.read_bytes()), np.asarray(image.convert("RGB"))
            )
