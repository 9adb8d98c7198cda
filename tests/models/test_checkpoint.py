import pickle
import re
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gradnorm_jax.models.checkpoint import (
    CheckpointEntry,
    check_checkpoint,
    from_params,
    read_checkpoint,
    to_params,
    write_checkpoint,
)

ARRAYS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "a/bias": np.ones(3)}


def layout(path):
    """Kernels transposed under `w/...`, everything else as it is."""
    name = "/".join(path)
    return (
        CheckpointEntry(f"w/{name}", axes=(2, 0, 1))
        if path[-1] == "kernel"
        else CheckpointEntry(name)
    )


def test_npz_round_trip_is_exact(tmp_path):
    write_checkpoint(tmp_path / "w.npz", ARRAYS)
    read = read_checkpoint(str(tmp_path / "w.npz"))
    assert sorted(read) == sorted(ARRAYS)
    for key, array in ARRAYS.items():
        assert read[key].dtype == array.dtype
        np.testing.assert_array_equal(read[key], array)


def test_safetensors_are_read(tmp_path):
    narrow = np.asarray([0.5, -2.0], ml_dtypes.bfloat16)
    safetensors.numpy.save_file({**ARRAYS, "narrow": narrow}, tmp_path / "w.safetensors")
    read = read_checkpoint(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(read["a/kernel"], ARRAYS["a/kernel"])
    params = to_params({"narrow": read["narrow"]}, {"narrow": jnp.zeros(2)}, layout)
    assert params["narrow"].dtype == jnp.float32
    assert params["narrow"].tolist() == [0.5, -2.0]


def test_writing_anything_but_npz_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"w\.bin; end the path in \.npz"):
        write_checkpoint(tmp_path / "w.bin", ARRAYS)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*nothing\.npz"):
        read_checkpoint(tmp_path / "nothing.npz")


def test_other_kinds_of_file_are_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"w\.pth; convert it to \.npz or \.safetensors"):
        read_checkpoint(tmp_path / "w.pth")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def write_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def write_objects(path):
    np.savez(path, a=np.asarray([Bomb()], dtype=object))


def write_text(path):
    path.write_text("version https://example.org/pointer")


def write_nothing(path):
    path.write_bytes(b"")


def write_other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))


def write_half(path):
    np.savez(path, a=np.ones(1000))
    path.write_bytes(path.read_bytes()[:4000])


def write_flipped_bit(path):
    np.savez(path, a=np.ones(1000))
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_pickle, "not a whole .npz file"),
        (write_objects, "Object arrays cannot be loaded"),
        (write_text, "not a whole .npz file"),
        (write_nothing, "not a whole .npz file"),
        (write_other_archive, "'archive/data.pkl', which is not an array"),
        (write_half, "not a whole .npz file"),
        (write_flipped_bit, "Bad CRC-32"),
    ],
)
def test_bad_npz_is_refused_and_never_unpickled(tmp_path, write, reason):
    path = tmp_path / "w.npz"
    write(path)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "numpy.savez" in str(error.value)


def test_bad_safetensors_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"w\.safetensors is not a whole \.safetensors file"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_conversion_permutes_axes_and_back():
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    checkpoint = {"w/a/kernel": kernel, "a/bias": np.arange(2, dtype=np.float64)}
    template = {"a": {"kernel": jnp.zeros((4, 2, 3)), "bias": jnp.zeros(2)}}
    params = to_params(checkpoint, template, layout)
    assert params["a"]["kernel"][3, 1, 2] == kernel[1, 2, 3]
    assert jax.tree.map(lambda leaf: leaf.dtype, params) == {
        "a": {"kernel": jnp.float32, "bias": jnp.float32}
    }
    back = from_params(params, layout)
    assert back.keys() == checkpoint.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, checkpoint[key])


def test_one_error_lists_everything_wrong():
    checkpoint = {"same": np.zeros(2), "shape": np.zeros((2, 3)), "type": np.zeros(4, np.uint8)}
    checkpoint |= {"extra": np.zeros(1)}
    with pytest.raises(ValueError, match="another architecture") as error:
        check_checkpoint(checkpoint, {"same": (2,), "shape": (3, 2), "type": (4,), "gone": ()})
    message = str(error.value)
    assert "1 missing (gone)" in message
    assert "1 unexpected (extra)" in message
    assert (
        "2 of another shape or type (shape is float64[2, 3] in place of float[3, 2], "
        "type is uint8[4] in place of float[4])"
    ) in message


def test_long_lists_are_cut_but_counted():
    expected = {f"key{index:03d}": (1,) for index in range(123)}
    with pytest.raises(ValueError, match="123 missing") as error:
        check_checkpoint({}, expected)
    assert "key004 and 118 more" in str(error.value)
    assert "0 unexpected;" in str(error.value)
    assert len(str(error.value)) < 300
