"""PyTorch's files, where PyTorch is installed."""

import argparse
import functools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm_jax.weights.files import read_checkpoint
from tests.hostile import an_answer_or_a_sentence
from tests.resnet20 import read_state_dict
from tests.weights.test_files import Bomb


def test_without_torch_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    sentence = (
        r"PyTorch's weights files, unless converted .* elsewhere, need torch, .*jax\[torch\]'"
    )
    with pytest.raises(ModuleNotFoundError, match=sentence):
        read_checkpoint(tmp_path / "w.pth")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the extra torch")


def state_dict(torch):
    return {
        "module.conv.weight": torch.arange(6.0).reshape(2, 3).T,
        "module.bn.running_mean": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        "module.bn.num_batches_tracked": torch.tensor(7),
    }


@pytest.mark.parametrize("suffix", ["pth", "pt", "th", "pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_state_dicts_are_read(torch, tmp_path, suffix, zipped, wrapper):
    saved = state_dict(torch)
    if wrapper is not None:
        saved = {"epoch": 3, "arch": "resnet", "optimizer": {"state": {}}, wrapper: saved}
    path = tmp_path / f"w.{suffix}"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    headers = {}
    read = read_checkpoint(path, headers.update)
    assert {key: array.tolist() for key, array in read.items()} == {
        "conv.weight": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
        "bn.running_mean": [0.5, -2.0],
    }
    assert read["bn.running_mean"].dtype == jnp.float32
    assert {key: header.shape for key, header in headers.items()} == {
        key: array.shape for key, array in read.items()
    }


def test_a_real_file_is_read_as_without_torch(torch, shared_data):
    path = shared_data / "weights" / "resnet20-12fca82f.th"
    read, expected = read_checkpoint(path), read_state_dict(path)
    assert read.keys() == expected.keys()
    for key, array in read.items():
        np.testing.assert_array_equal(array, expected[key])


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (lambda torch: torch.nn.Linear(2, 3), "holds a pickled torch.nn.modules.linear.Linear"),
        (lambda torch: {"args": argparse.Namespace(), "model": {}}, "pickled argparse.Namespace"),
        (lambda torch: {"model": Bomb()}, "holds a pickled"),
        (lambda torch: torch.ones(3), "holds a Tensor, which is no state dict"),
        (lambda torch: {"epoch": 3}, "the entry 'epoch' is of type int"),
        (lambda torch: {3: torch.ones(2)}, "the entry 3 is of type Tensor"),
        (lambda torch: {"a": torch.eye(2).to_sparse()}, "sparse, quantised or empty"),
        (lambda torch: {"a": torch.ones(2, device="meta")}, "sparse, quantised or empty"),
    ],
)
def test_what_is_no_state_dict_is_named_with_a_remedy(torch, tmp_path, saved, reason):
    path = tmp_path / "w.pth"
    torch.save(saved(torch), path)
    with pytest.raises(
        ValueError, match=rf"w\.pth cannot be read .*{reason}.*; save the module's "
    ):
        read_checkpoint(path)


def test_other_files_are_refused(torch, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "script.pt")
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    (tmp_path / "w.npz").rename(tmp_path / "array.pt")
    (tmp_path / "text.pt").write_text("version https://example.org/pointer")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("script.pt", "array.pt", "text.pt", "empty.pt"):
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read .*; save the module's"
        ) as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


@functools.cache
def whole(torch, folder, zipped):
    path = folder / f"whole-{zipped}.pth"
    torch.save({"state_dict": state_dict(torch)}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


@given(data=st.data(), zipped=st.booleans())
@settings(max_examples=200, deadline=5000)
def test_any_damage_is_survived_or_refused(torch, tmp_path_factory, data, zipped):
    content = bytearray(whole(torch, tmp_path_factory.getbasetemp(), zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with an_answer_or_a_sentence(path):
        read_checkpoint(path)
