import fnmatch
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.models import (
    MODELS,
    get_architecture,
    init_model,
    load_model,
    save_weights,
)
from gradnorm_jax.tree import get_leaf

IMAGES = jnp.linspace(-1.0, 1.0, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)


def test_table():
    assert list(MODELS) == [
        "bit_r50x1",
        "bit_r101x1",
        "bit_r152x2",
        "bit_r50x3",
        "bit_r101x3",
        "bit_r152x4",
        "bit_tiny",
        "mobilenet_v2",
    ]
    assert all(name == row.name for name, row in MODELS.items())
    rows = {n: (r.preprocess, r.image_size, r.label_offset) for n, r in MODELS.items()}
    assert rows.pop("bit_tiny") == ("bit32", 32, 0)
    assert rows.pop("mobilenet_v2") == ("crop224", 224, 1)
    assert set(rows.values()) == {("bit480", 480, 0)}


@pytest.mark.parametrize("name", MODELS)
def test_head_and_keys(name):
    row = MODELS[name]
    images = jax.ShapeDtypeStruct((1, row.image_size, row.image_size, 3), jnp.float32)
    outputs, variables = jax.eval_shape(row.build(17).init_with_output, jax.random.key(0), images)
    assert list(variables) == ["params"]
    params = variables["params"]
    assert get_leaf(params, row.head.kernel).shape == (1, 1, outputs.features.shape[-1], 17)
    assert get_leaf(params, row.head.bias).shape == (17,)
    paths = [tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert len({row.layout(path).key for path in paths}) == len(paths)


def test_blocks_are_found_by_pattern(tiny_file):
    params = load_model("bit_tiny", tiny_file).params
    paths = [
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert len(fnmatch.filter(paths, "block4/*")) == 10


def test_number_of_classes_is_the_files(tiny_file):
    model = load_model("bit_tiny", tiny_file)
    outputs = jax.eval_shape(model.apply, model.params, IMAGES)
    assert outputs.features.shape == (2, 512)
    assert outputs.logits.shape == (2, 7)


def test_round_trip_is_exact(tiny_file, tiny_weights, tmp_path):
    save_weights(load_model("bit_tiny", tiny_file).params, "bit_tiny", tmp_path / "copy.npz")
    with np.load(tmp_path / "copy.npz") as copy:
        assert sorted(copy) == sorted(tiny_weights)
        for key, array in tiny_weights.items():
            np.testing.assert_array_equal(copy[key], array)
            assert copy[key].dtype == array.dtype


def test_numbered_file_loads_alike(tiny_file, tiny_weights, tmp_path):
    numbered = {
        key.replace("standardized_conv2d", f"standardized_conv2d_{number}"): array
        for number, (key, array) in enumerate(tiny_weights.items())
    }
    np.savez(tmp_path / "numbered.npz", **numbered)
    plain, other = (
        load_model("bit_tiny", tiny_file),
        load_model("bit_tiny", tmp_path / "numbered.npz"),
    )
    jax.tree.map(np.testing.assert_array_equal, plain.params, other.params)


def test_equal_configurations_share_one_trace(tiny_file, tiny_weights, tmp_path):
    np.savez(tmp_path / "other.npz", **{k: 2 * array for k, array in tiny_weights.items()})
    traces = []

    @jax.jit
    def features(model, images):
        traces.append(images.shape)
        return model(images).features

    for path in (tiny_file, tmp_path / "other.npz", tiny_file):
        features(load_model("bit_tiny", path), IMAGES)
    assert len(traces) == 1
    features(load_model("bit_tiny", tiny_file, dtype="bfloat16"), IMAGES)
    features(load_model("bit_tiny", tiny_file, dtype=jnp.bfloat16), IMAGES)
    assert len(traces) == 2


def test_bfloat16_computes_in_it_with_float32_parameters(tiny_file):
    model = load_model("bit_tiny", tiny_file, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(model.apply)(model.params, IMAGES))
    convolutions = re.findall(r":(\w+)\[[\d,]+\] = conv_general_dilated", program)
    # Stem, four blocks of three with a projection each, and the head.
    assert convolutions == ["bf16"] * 17 + ["f32"]


def test_weights_of_another_architecture_are_refused(tiny_file):
    with pytest.raises(ValueError, match=r"architecture: 108 missing .* 44 of another shape"):
        load_model("bit_r50x1", tiny_file)
    with pytest.raises(ValueError, match=r"106 missing .* 45 unexpected"):
        load_model("mobilenet_v2", tiny_file)


@pytest.mark.parametrize(
    "call",
    [
        lambda path: load_model("resnet", path),
        lambda path: init_model("resnet", 3, jax.random.key(0)),
        lambda path: save_weights({}, "resnet", path),
    ],
)
def test_unknown_name_lists_the_known(tiny_file, call):
    with pytest.raises(ValueError, match=r"'resnet'; choose one of bit_r50x1, .*mobilenet_v2"):
        call(tiny_file)


@pytest.mark.parametrize("published", ["bit_s_r101x1", "bit_m_r101x1"])
def test_published_names_of_weights_name_their_network(published):
    assert get_architecture(published) is MODELS["bit_r101x1"]


def test_new_model_depends_on_its_key_alone():
    first = init_model("bit_tiny", 4, jax.random.key(1))
    again = init_model("bit_tiny", 4, jax.random.key(1), dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    other = init_model("bit_tiny", 4, jax.random.key(2))
    assert not np.array_equal(*(get_leaf(m.params, m.head.kernel) for m in (first, other)))
    assert jax.eval_shape(first.apply, first.params, IMAGES).logits.shape == (2, 4)
