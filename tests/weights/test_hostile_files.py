"""Weights files that are damaged, lie, or hold nonsense."""

import io
import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_jax.models import get_architecture, init_model, load_model
from gradnorm_jax.models.checkpoint import from_params
from gradnorm_jax.weights.files import read_checkpoint
from tests.hostile import an_answer_or_a_sentence


@pytest.fixture(scope="module")
def arrays():
    """The arrays of a whole file of `bit_tiny`."""
    params = init_model("bit_tiny", 3, jax.random.key(0)).params
    return jax.device_get(from_params(params, get_architecture("bit_tiny").layouts[0].entry))


def npy(header, data=b""):
    """An array's file with any header."""
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def claim(shape, dtype="<f4"):
    return npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}", bytes(8))


def write(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def file_of(array):
    with io.BytesIO() as file:
        np.save(file, array)
        return file.getvalue()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_numbers_that_are_not_finite_are_refused_by_key(tmp_path, arrays, bad, suffix):
    key = "resnet/block2/unit01/b/standardized_conv2d/kernel"
    spoilt = arrays[key].copy()
    spoilt[1, 1, 0, 3] = bad
    path = tmp_path / f"w.{suffix}"
    save = (
        safetensors.numpy.save_file
        if suffix == "safetensors"
        else lambda found, path: np.savez(path, **found)
    )
    save(arrays, path)
    load_model("bit_tiny", path)
    save({**arrays, key: spoilt}, path)
    with pytest.raises(ValueError, match=rf"not finite, 1 arrays \({key}\): it is damaged"):
        load_model("bit_tiny", path)


@pytest.mark.parametrize(
    "shape", ["(1000000000000,)", f"({10**20},)", f"(0, {10**30})", "(-1, -2)", "(3,)", "()"]
)
def test_a_header_that_lies_costs_no_memory(tmp_path, shape):
    write(tmp_path / "w.npz", {"a.npy": claim(shape)})
    with pytest.raises(ValueError, match=r"header of 'a.npy' claims .*; write its arrays again"):
        read_checkpoint(tmp_path / "w.npz")


def test_shapes_are_compared_before_anything_is_read(tmp_path, monkeypatch, arrays):
    key = "resnet/block1/unit01/a/standardized_conv2d/kernel"
    np.savez(tmp_path / "w.npz", **{**arrays, key: np.zeros((1, 1, 16, 17), np.float32)})
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"float32\[1, 1, 16, 17\] in place of float\[1, 1, 16, 1"):
        load_model("bit_tiny", tmp_path / "w.npz")


def test_a_head_without_bias_is_all_that_is_blamed(tmp_path, arrays):
    np.savez(
        tmp_path / "w.npz",
        **{key: array for key, array in arrays.items() if key != "resnet/head/conv2d/bias"},
    )
    with pytest.raises(ValueError, match=r"1 missing \(resnet/head/conv2d/bias\); 0 unexp.* 0 of"):
        load_model("bit_tiny", tmp_path / "w.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_compression_is_one_sentence(tmp_path, method):
    path = tmp_path / "w.npz"
    noise = np.random.default_rng(0).normal(size=2000)
    write(path, {"a.npy": file_of(noise)}, method)
    whole = path.read_bytes()
    # From 100 on: some bits of LZMA's own header decide nothing.
    for position in range(100, len(whole) - 200, 997):
        path.write_bytes(whole[:position] + b"\xff\x00\xff\x00" + whole[position + 4 :])
        with pytest.raises(ValueError, match=r"w\.npz cannot be read .*numpy\.savez"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("field", "value", "reason"), [(6, 1, "encrypted"), (8, 97, "compression method")]
)
def test_strange_zip_files_are_named_with_a_remedy(tmp_path, field, value, reason):
    path = tmp_path / "w.npz"
    write(path, {"a.npy": file_of(np.ones(3))})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[field] = content[directory + field + 2] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.npz cannot be read .*{reason}.*numpy\.savez"):
        read_checkpoint(path)


def test_endings_in_capitals(tmp_path):
    write(tmp_path / "W.NPZ", {"a.npy": file_of(np.ones(3))})
    assert read_checkpoint(tmp_path / "W.NPZ")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "meant"), [("BiT-S-R50x1", "bit_r50x1"), ("mobilenetv2", "mobilenet_v2")]
)
def test_a_name_that_is_nearly_right(name, meant):
    with pytest.raises(ValueError, match=f"did you mean {meant}\\? choose one of"):
        get_architecture(name)


@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.builds(
            claim,
            st.lists(st.integers(-(2**70), 2**70), max_size=3).map(lambda x: str(tuple(x))),
            st.sampled_from(["<f4", "|O", "<U9", "|V7", "nonsense"]),
        ),
        st.text(max_size=100).map(npy),
    )
)
@settings(max_examples=150, deadline=5000)
def test_any_array_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "w.npz"
    write(path, {"a.npy": content})
    with an_answer_or_a_sentence(path):
        assert isinstance(read_checkpoint(path)["a"], np.ndarray)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found = {"a": np.arange(30.0), "b": np.ones((2, 3), np.float32)}
    np.savez_compressed(folder / "w.npz", **found)
    safetensors.numpy.save_file(found, folder / "w.safetensors")
    (folder / "w.msgpack").write_bytes(flax.serialization.to_bytes({"params": found, "step": 3}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(data=st.data(), name=st.sampled_from(["w.npz", "w.safetensors", "w.msgpack"]))
@settings(max_examples=400, deadline=5000)
def test_any_damage_is_survived_or_refused(tmp_path_factory, whole_files, data, name):
    content = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with an_answer_or_a_sentence(path):
        read_checkpoint(path)


def test_widths_of_other_types_are_checked(tmp_path):
    narrow = jnp.asarray([1.0, jnp.nan], jnp.bfloat16)
    safetensors.numpy.save_file({"a": np.asarray(narrow)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_model("bit_tiny", tmp_path / "w.safetensors")
