"""Weights files of every format, in the shapes that training code leaves them in."""

import pickle
import re
import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from gradnorm_jax.models import MODELS, load_model
from gradnorm_jax.models.architecture import template
from gradnorm_jax.weights.files import read_checkpoint, write_checkpoint
from gradnorm_jax.weights.stored import plain_names

ARRAYS = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "a/bias": np.ones(3)}
PLAIN = {"a/kernel": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "bn/mean": [7.0, 8.0]}


def state():
    """What a training script of Flax saves."""
    return {
        "params": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
        "batch_stats": {"bn": {"mean": np.asarray([7.0, 8.0])}},
        "opt_state": [{"mu": {"a": {"kernel": jnp.ones((2, 3))}}}, None],
        "step": 3,
    }


def listed(checkpoint):
    return {key: array.tolist() for key, array in sorted(checkpoint.items())}


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
    assert read["narrow"].dtype == jnp.bfloat16
    assert read["narrow"].tolist() == [0.5, -2.0]


def test_writing_anything_but_npz_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"w\.bin; end the path in one of them"):
        write_checkpoint(tmp_path / "w.bin", ARRAYS)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*nothing\.npz"):
        read_checkpoint(tmp_path / "nothing.npz")


def test_other_kinds_of_file_are_refused(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"w\.h5; known are \.npz, .* and folders of Orbax"):
        read_checkpoint(tmp_path / "w.h5")


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


def test_msgpack_of_flax(tmp_path):
    for name in ("w.msgpack", "checkpoint_3"):
        (tmp_path / name).write_bytes(flax.serialization.to_bytes(state()))
        assert listed(read_checkpoint(tmp_path / name)) == PLAIN
    (tmp_path / "bare.msgpack").write_bytes(flax.serialization.to_bytes(state()["params"]))
    assert listed(read_checkpoint(tmp_path / "bare.msgpack")) == {"a/kernel": PLAIN["a/kernel"]}
    (tmp_path / "w.msgpack").write_bytes(flax.serialization.msgpack_serialize([1]))
    with pytest.raises(
        ValueError, match=r"w\.msgpack cannot be read .* a list is no tree of arrays; write"
    ):
        read_checkpoint(tmp_path / "w.msgpack")


def test_folders_of_orbax(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", state())
    with ocp.CheckpointManager(tmp_path / "many") as manager:
        for step in (7, 9):
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state())))
    for folder in ("one", "many/9", "many/7/state"):
        read = read_checkpoint(tmp_path / folder)
        assert listed(read) == PLAIN
        assert {type(array) for array in read.values()} == {np.ndarray}
    with pytest.raises(ValueError, match="many holds several checkpoints, 7, 9: name one of them"):
        read_checkpoint(tmp_path / "many")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is a folder, but not a checkpoint of Orbax"):
        read_checkpoint(tmp_path / "empty")


def test_a_network_with_batch_statistics_comes_back_from_orbax(tmp_path):
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
        template(MODELS["resnet20_cifar"], 7),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {**variables, "step": 3})
    model = load_model("resnet20_cifar", tmp_path / "state", on_host=True)
    read = {"params": model.params, **model.state}
    jax.tree.map(np.testing.assert_array_equal, read, variables)


def test_shapes_in_orbax_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", state())
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler, "restore", lambda *_, **__: pytest.fail("read")
    )

    def refuse(headers):
        raise ValueError(str({key: header.shape for key, header in headers.items()}))

    with pytest.raises(ValueError, match=r"'a/kernel': \(2, 3\)"):
        read_checkpoint(tmp_path / "one", refuse)


def test_a_damaged_folder_of_orbax_is_one_sentence(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", state())
    (data,) = (tmp_path / "one" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"one cannot be read .*; save it again with Orbax$"
    ) as error:
        read_checkpoint(tmp_path / "one")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("keys", "plain"),
    [
        (["a", "b/c"], {"a": "a", "b/c": "b/c"}),
        (["params/cls", "opt/mu/cls"], {"cls": "params/cls"}),
        (["params/params/a"], {"a": "params/params/a"}),
        (
            ["params/bn/scale", "batch_stats/bn/mean"],
            {"bn/scale": "params/bn/scale", "bn/mean": "batch_stats/bn/mean"},
        ),
        (["module.a.weight", "module.b"], {"a.weight": "module.a.weight", "b": "module.b"}),
        (["module._orig_mod.a"], {"a": "module._orig_mod.a"}),
        (["module.a", "b"], {"module.a": "module.a", "b": "b"}),
        (["bn.num_batches_tracked", "bn.weight"], {"bn.weight": "bn.weight"}),
        ([], {}),
    ],
)
def test_plain_names(keys, plain):
    assert plain_names(keys) == plain


def test_two_arrays_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'a' twice: 'params/a' and 'batch_stats/a'"):
        plain_names(["params/a", "batch_stats/a"])


def test_writing_keeps_the_order_of_transposed_arrays(tmp_path):
    array = np.arange(6.0).reshape(2, 3).T
    for name in ("w.safetensors", "w.npz"):
        write_checkpoint(tmp_path / "new" / name, {"a": array, "b": jnp.ones(2)})
        assert listed(read_checkpoint(tmp_path / "new" / name)) == {
            "a": array.tolist(),
            "b": [1.0, 1.0],
        }
    assert {each.name for each in (tmp_path / "new").iterdir()} == {"w.safetensors", "w.npz"}
