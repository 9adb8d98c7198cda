import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gradnorm_jax.models import MODELS, bit
from gradnorm_jax.models.checkpoint import to_params

# Made by experiments/goldens/bit.py. Its weights and images let each of these shift the logits of
# the small network by 2e-4 or more: the unbiased variance; another epsilon of weights or norms;
# SAME padding of stem, pool or 3x3; a pool padded by minus infinity; the stride on the first 1x1;
# a projection of the raw input.
SMALL_FEATURES = [
    [0.013870420980444245, 0.0, 0.0, 0.004134260195983251],
    [0.013325660889021207, 0.0, 0.005280194270303614, 0.005108353614314186],
]
SMALL_LOGITS = [
    [0.33925054493910256, -0.50678592493624, 0.752998877454352],
    [0.40647751557630357, -0.46697234395102205, 0.8650801203942725],
]
R50X1_FEATURES = [[0.0089288708554065, 0.0, 0.010032637222238556, 0.0009237650956587978]]
R50X1_LOGITS = [
    [
        -0.0355762589667188,
        -0.34334387422473117,
        -1.0217062957684346,
        0.4094892338308296,
        -0.8513876472079471,
        0.914794610676976,
        0.3146525558654169,
        1.3235106252968827,
        0.7430695970686036,
        0.1931044916271325,
    ]
]

DEPTHS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3), "r152": (3, 8, 36, 3)}


def weights_and_images(formula, module, image_shape):
    """Formula weights as parameters and formula images, both float64 if the module is."""
    dtype = jnp.float64 if module.dtype == jnp.float64 else jnp.float32
    images = jnp.asarray(formula.numbers(image_shape, seed=0), dtype)
    template = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), template)
    shapes = formula.bit_shapes(module.depths, module.width, module.num_classes)
    return to_params(formula.bit_weights(shapes), template, bit.layout), images


def outputs_of(formula, module, image_shape):
    params, images = weights_and_images(formula, module, image_shape)
    outputs = jax.jit(module.apply)({"params": params}, images)
    head = params["head"]["conv2d"]
    expected = outputs.features @ head["kernel"][0, 0] + head["bias"][None]
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-5, atol=1e-6)
    return outputs


def small(dtype):
    return bit.BiT(3, depths=(2, 1, 1, 1), width=8, groups=4, dtype=dtype)


def test_small_network_equals_independent_implementation(formula, x64):
    outputs = outputs_of(formula, small(jnp.float64), (2, 37, 52, 3))
    assert outputs.features.shape == (2, 256)
    np.testing.assert_allclose(outputs.features[:, :4], SMALL_FEATURES, rtol=0, atol=1e-12)
    np.testing.assert_allclose(outputs.logits, SMALL_LOGITS, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_r50x1_equals_independent_implementation(formula, x64):
    outputs = outputs_of(formula, bit.BiT(10, dtype=jnp.float64), (1, 64, 96, 3))
    assert outputs.features.shape == (1, 2048)
    np.testing.assert_allclose(outputs.features[:, :4], R50X1_FEATURES, rtol=0, atol=1e-12)
    np.testing.assert_allclose(outputs.logits, R50X1_LOGITS, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_narrow_activations_leave_float32_outputs_near_the_exact_ones(formula, dtype, tolerance):
    outputs = outputs_of(formula, small(dtype), (2, 37, 52, 3))
    assert outputs.features.dtype == outputs.logits.dtype == jnp.float32
    np.testing.assert_allclose(outputs.logits, SMALL_LOGITS, rtol=0, atol=tolerance)


def test_standardize_uses_biased_variance_and_epsilon_under_the_root():
    kernel = jnp.asarray([1e-5, -1e-5, 3e-5, -3e-5]).reshape(2, 1, 2, 1)
    # Mean 0, biased variance 5e-10: the root is sqrt(6e-10).
    expected = np.asarray([1, -1, 3, -3]) / np.sqrt(6.0)
    np.testing.assert_allclose(bit.standardize(kernel).ravel(), expected, rtol=1e-6)


def test_standardize_treats_each_output_by_itself():
    kernel = jnp.stack([jnp.asarray([1.0, 3.0]), jnp.asarray([-40.0, 60.0])], axis=-1)
    standardized = bit.standardize(kernel.reshape(1, 1, 2, 2))
    np.testing.assert_allclose(standardized[0, 0], [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-6)


def test_group_norm_keeps_its_digits_far_from_zero():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bit._normalize_and_rectify(x, 2)

    offset = 4096.0
    x = np.asarray([-2.0, 1.0, 3.0, -6.0]).reshape(1, 2, 1, 2).repeat(2, axis=-1)
    x = x * np.asarray([1.0, 1.0, 0.5, 0.5])
    params = {"params": {"group_norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}}
    near = Norm().apply(params, jnp.asarray(x, jnp.float32))
    far = Norm().apply(params, jnp.asarray(x + offset, jnp.float32))
    np.testing.assert_allclose(far, near, rtol=1e-6, atol=1e-6)
    # Groups are neighbouring channels: over -2, -2, 3, 3 and 1, 1, -6, -6 at half size.
    grouped = x.reshape(2, 2, 2)
    centred = grouped - grouped.mean(axis=(0, 2), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(axis=(0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        np.reshape(near, (2, 2, 2)), np.maximum(expected, 0.0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "depths", "multiplier", "parameters"),
    [
        ("bit_r50x1", DEPTHS["r50"], 1, 25_549_352),
        ("bit_r101x1", DEPTHS["r101"], 1, 44_541_480),
        ("bit_r152x2", DEPTHS["r152"], 2, 236_335_208),
        ("bit_r50x3", DEPTHS["r50"], 3, 217_319_080),
        ("bit_r101x3", DEPTHS["r101"], 3, 387_934_888),
        ("bit_r152x4", DEPTHS["r152"], 4, 936_533_224),
    ],
)
def test_keys_shapes_and_parameter_counts_are_the_published_ones(
    formula, name, depths, multiplier, parameters
):
    module = MODELS[name].build(1000)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    shapes = {bit.layout(tuple(key.key for key in path)).key: leaf.shape for path, leaf in leaves}
    assert shapes == formula.bit_shapes(depths, 64 * multiplier, 1000)
    assert sum(leaf.size for _, leaf in leaves) == parameters


def test_numbers_of_layers_are_removed():
    clean = bit.remove_numbers(
        {
            "resnet/block1/unit02/a/standardized_conv2d_17/kernel": np.zeros(1),
            "resnet/block1/unit02/a/group_norm_3/gamma": np.ones(1),
            "resnet/head/conv2d/kernel": np.full(1, 2.0),
        }
    )
    assert clean == {
        "resnet/block1/unit02/a/standardized_conv2d/kernel": 0.0,
        "resnet/block1/unit02/a/group_norm/gamma": 1.0,
        "resnet/head/conv2d/kernel": 2.0,
    }


def test_two_numbers_of_one_layer_are_refused():
    key = "resnet/block1/unit02/a/standardized_conv2d{}/kernel"
    with pytest.raises(ValueError, match="'resnet/block1/unit02/a/standardized_conv2d/kernel'"):
        bit.remove_numbers({key.format("_1"): np.zeros(1), key.format("_2"): np.zeros(1)})


def test_gradient_reaches_every_parameter(formula):
    module = bit.BiT(3, depths=(1, 1), width=8, groups=4)
    params, images = weights_and_images(formula, module, (2, 16, 16, 3))

    @jax.jit
    @jax.grad
    def gradient(params):
        return module.apply({"params": params}, images).logits[:, 0].sum()

    leaves = jax.tree_util.tree_leaves_with_path(gradient(params))
    sizes = {jax.tree_util.keystr(path): float(np.abs(leaf).max()) for path, leaf in leaves}
    assert [path for path, size in sizes.items() if not 0 < size < np.inf] == []
