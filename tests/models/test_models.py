import fnmatch
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.models import (
    MODELS,
    get_architecture,
    init_model,
    load_model,
    save_weights,
)
from gradnorm_jax.models.architecture import count_classes, find_layout, template
from gradnorm_jax.models.checkpoint import from_params, merge
from gradnorm_jax.tree import get_leaf, leaves_by_path

IMAGES = jnp.linspace(-1.0, 1.0, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)


def test_table():
    assert all(name == row.name for name, row in MODELS.items())
    assert get_preprocess(MODELS["bit_tiny"].preprocess).size == 32
    rows = [(row.preprocess, row.image_size, row.label_offset) for row in MODELS.values()]
    assert {("crop224", 224, 1), ("bit480", 480, 0)} <= set(rows)
    for row in MODELS.values():
        assert get_preprocess(row.preprocess).size == row.image_size
        assert row.name == "bit_tiny" or (row.source and row.license)


@pytest.mark.parametrize("name", MODELS)
def test_every_variable_has_a_place_in_every_layout(name):
    row = MODELS[name]
    variables = template(row, 17)
    assert {"params"} <= set(variables) <= {"params", "batch_stats"}
    params = variables["params"]
    assert get_leaf(params, row.classifier_path).shape[-1] == 17
    if row.head is not None and row.head.bias is not None:
        assert get_leaf(params, row.head.bias).shape == (17,)
    merged = merge(variables)
    assert len(leaves_by_path(merged)) == len(jax.tree.leaves(variables))
    for layout in row.layouts:
        entries = [layout.entry(path) for path in leaves_by_path(merged)]
        assert len({(entry.key, entry.part) for entry in entries}) == len(entries)
        headers = jax.eval_shape(functools.partial(from_params, layout=layout.entry), merged)
        assert find_layout(headers, row) is layout
        assert count_classes(headers, row, layout) == 17


# The smallest of each family: tracing the others takes long and shows no more.
FAMILIES = (
    "bit_tiny",
    "resnet18",
    "densenet101_cifar",
    "mobilenet_v2",
    "mobilenet_v2_torch",
    "resnet20_cifar",
    "squeezenet1_1",
    "vit_ti16",
    "wide_resnet40_2_cifar",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_ends_before_the_features(name):
    row = MODELS[name]
    images = jax.ShapeDtypeStruct((2, row.image_size, row.image_size, 3), jnp.float32)
    module = row.build(17, dtype=jnp.bfloat16)
    outputs = jax.eval_shape(module.apply, template(row, 17), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    assert outputs.logits.shape == (2, 17)


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


def test_weights_of_another_architecture_are_refused(tiny_file, tiny_weights, tmp_path):
    with pytest.raises(ValueError, match=r"^these are weights of bit_tiny and not of bit_r50"):
        load_model("bit_r50x1", tiny_file)
    np.savez(tmp_path / "wide.npz", **{k: np.repeat(v, 3, -1) for k, v in tiny_weights.items()})
    with pytest.raises(ValueError, match=r"architecture: 108 missing .* 44 of another shape"):
        load_model("bit_r50x1", tmp_path / "wide.npz")
    with pytest.raises(ValueError, match=r"106 missing .* 45 unexpected"):
        load_model("mobilenet_v2", tmp_path / "wide.npz")


@pytest.fixture(scope="module")
def resnet20_arrays(formula):
    """Random variables of `resnet20_cifar`, by collection."""
    leaves, tree = jax.tree.flatten(template(MODELS["resnet20_cifar"], 10))
    arrays = [formula.numbers(leaf.shape, i).astype("f") for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, arrays)


@pytest.fixture(scope="module")
def resnet20_file(resnet20_arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.npz"
    state = {"batch_stats": resnet20_arrays["batch_stats"]}
    save_weights(resnet20_arrays["params"], "resnet20_cifar", path, state=state)
    return path


def test_weights_of_another_size_name_it(resnet20_file):
    with pytest.raises(ValueError, match=r"did you mean resnet20_cifar\?$"):
        load_model("resnet32_cifar", resnet20_file)


def test_batch_statistics_survive_a_round_trip(resnet20_arrays, resnet20_file):
    model = load_model("resnet20_cifar", resnet20_file)
    assert list(model.state) == ["batch_stats"]
    loaded = {"params": model.params, **model.state}
    jax.tree.map(np.testing.assert_array_equal, loaded, resnet20_arrays)


def test_batch_statistics_are_not_forgotten(resnet20_arrays, tmp_path):
    with pytest.raises(ValueError, match=r"38 missing \(bn1.running_mean, "):
        save_weights(resnet20_arrays["params"], "resnet20_cifar", tmp_path / "w.npz")


def test_counts_of_batches_and_prefixes_of_parallel_training_are_left_out(resnet20_file, tmp_path):
    with np.load(resnet20_file) as file:
        arrays = {f"module.{key}": file[key] for key in file}
    arrays["module.bn1.num_batches_tracked"] = np.int64(3)
    np.savez(tmp_path / "parallel.npz", **arrays)
    models = [load_model("resnet20_cifar", p) for p in (tmp_path / "parallel.npz", resnet20_file)]
    jax.tree.map(np.testing.assert_array_equal, *(model.variables for model in models))


@pytest.mark.parametrize(
    "call",
    [
        lambda path: load_model("resnet", path),
        lambda path: init_model("resnet", 3, jax.random.key(0)),
        lambda path: save_weights({}, "resnet", path),
    ],
)
def test_unknown_name_lists_the_known(tiny_file, call):
    with pytest.raises(
        ValueError,
        match=r"'resnet'; did you mean resnet\d+\? choose one of bit_r50x1, ",
    ):
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
