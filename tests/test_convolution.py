"""Convolutions as they are done on CPUs, against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from gradnorm_jax.adapters.linen import from_linen
from gradnorm_jax.convolution import lower_convolutions, means_on_cpu

LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CNHW", "HWOI", "NHWC")]

# Extent of the kernel, channels, groups of these, outputs of one group, and what else a convolution
# can be told.
OPTIONS = {
    "plain": ((3, 2), 4, 4, 1, {"window_strides": (1, 1), "padding": "SAME"}),
    "strides, dilated kernel": (
        (3, 2),
        4,
        4,
        2,
        {"window_strides": (2, 1), "rhs_dilation": (1, 2), "padding": [(2, 0), (1, 3)]},
    ),
    "negative padding": (
        (3, 2),
        4,
        4,
        3,
        {"window_strides": (2, 2), "padding": [(-1, 2), (0, 1)]},
    ),
    "dilated input": (
        (3, 2),
        4,
        4,
        1,
        {"window_strides": (1, 2), "lhs_dilation": (2, 3), "padding": [(1, 1), (3, 0)]},
    ),
    "two groups of two channels": (
        (3, 2),
        4,
        2,
        3,
        {"window_strides": (2, 1), "rhs_dilation": (1, 2), "padding": [(2, 0), (1, 3)]},
    ),
    "1 x 1": ((1, 1), 4, 1, 5, {"window_strides": (1, 1), "padding": "SAME"}),
    "1 x 1, strides and padding": (
        (1, 1),
        4,
        1,
        5,
        {"window_strides": (2, 3), "padding": [(1, 0), (-1, 2)]},
    ),
    "many channels": (
        (3, 2),
        256,
        1,
        256,
        {"window_strides": (2, 1), "rhs_dilation": (1, 2), "padding": [(2, 0), (1, 3)]},
    ),
}


def operands(layout, kernel_size, channels, groups, outputs, dtype):
    generator = np.random.default_rng(0)
    x, kernel = (
        generator.normal(size=(2, 9, 8, channels)),
        generator.normal(size=(*kernel_size, channels // groups, outputs * groups)),
    )
    kernel /= np.sqrt(kernel[..., 0].size)
    x = x.transpose(["NHWC".index(axis) for axis in layout[0]])
    kernel = kernel.transpose(["HWIO".index(axis) for axis in layout[1]])
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def convolve(x, kernel, **options):
    return lax.conv_general_dilated(x, kernel, **options)


def count(function, *arguments):
    """Convolutions that are left on a CPU."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",))
    return program.as_text().count("stablehlo.convolution")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients(layout, case, x64):
    size, channels, groups, outputs, options = OPTIONS[case]
    x, kernel = operands(layout, size, channels, groups, outputs, jnp.float64)
    plain = functools.partial(
        convolve, dimension_numbers=layout, feature_group_count=groups, **options
    )

    def value_and_gradients(function, x, kernel):
        y, pull_back = jax.vjp(function, x, kernel)
        return y, pull_back(jnp.cos(y))

    products = functools.partial(value_and_gradients, lower_convolutions(plain))
    expected = jax.jit(functools.partial(value_and_gradients, plain))(x, kernel)
    assert count(plain, x, kernel) == 1
    in_turns = 1 < groups < channels  # one convolution without groups, in a loop
    # The cotangents' convolutions are left too, where the convolution is.
    assert (count(products, x, kernel) > 0) == in_turns
    actual = jax.jit(products)(x, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), actual, expected
    )


@pytest.mark.parametrize(("size", "groups"), [((3, 2), 4), ((1, 1), 1)])
def test_bfloat16_is_summed_in_float32(size, groups):
    x, kernel = operands(LAYOUTS[0], size, 4, groups, 1, jnp.bfloat16)
    options = {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": groups}
    function = functools.partial(convolve, dimension_numbers=LAYOUTS[0], **options)
    exact = function(x.astype(jnp.float32), kernel.astype(jnp.float32))
    result = lower_convolutions(function)(x, kernel)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, exact.astype(jnp.bfloat16))


def test_gradients_in_bfloat16():
    x, kernel = operands(LAYOUTS[0], (1, 1), 4, 1, 5, jnp.bfloat16)
    options = {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": LAYOUTS[0]}
    function = functools.partial(convolve, **options)

    def gradients(function, *operands):
        y, pull_back = jax.vjp(function, *operands)
        return pull_back(jnp.ones_like(y))

    actual = gradients(lower_convolutions(function), x, kernel)
    exact = gradients(function, x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert {gradient.dtype for gradient in actual} == {jnp.dtype(jnp.bfloat16)}
    rtol = float(jnp.finfo(jnp.bfloat16).eps)
    for a, b in zip(actual, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=rtol, atol=rtol / 8)


@pytest.mark.parametrize(
    ("image", "size", "channels", "outputs"),
    [
        (5, 3, 1, 4),
        (5, 3, 4, 4),
        (5, 3, 255, 256),
        (5, 3, 256, 255),
        (17, 3, 256, 256),
        (5, 4, 256, 256),
    ],
)
def test_other_convolutions_are_left_alone(image, size, channels, outputs):
    x, kernel = jnp.ones((1, image, image, channels)), jnp.ones((size, size, channels, outputs))
    function = functools.partial(
        convolve, window_strides=(1, 1), padding="SAME", dimension_numbers=LAYOUTS[0]
    )
    assert str(jax.make_jaxpr(lower_convolutions(function))(x, kernel)) == str(
        jax.make_jaxpr(function)(x, kernel)
    )


@pytest.mark.parametrize(("dtype", "size"), [(jnp.int8, 3), (jnp.float32, 9)])
def test_integers_and_large_kernels_are_left_alone(dtype, size):
    shapes = (1, 5, 5, 4), (size, size, 1, 4)
    numbers = lax.conv_dimension_numbers(*shapes, LAYOUTS[0])
    parameters = {"dimension_numbers": numbers, "feature_group_count": 4, "batch_group_count": 1}
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    assert means_on_cpu(*operands, parameters) is None


def test_other_platforms_keep_the_convolution():
    x, kernel = operands(LAYOUTS[0], (3, 2), 4, 4, 1, jnp.float32)
    function = lower_convolutions(
        functools.partial(
            convolve,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=LAYOUTS[0],
            feature_group_count=4,
        )
    )
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(x, kernel)
    assert exported.mlir_module().count("stablehlo.convolution") == 1


class Depthwise(nn.Module):
    """Depthwise convolutions under `jit`, recomputed, in a loop and in a branch."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Conv)(4, (3, 3), feature_group_count=4)(x)
        x = nn.jit(nn.Conv)(4, (3, 3), feature_group_count=4)(nn.relu(x))
        kernel = self.param("kernel", nn.initializers.normal(), (3, 3, 1, 4))

        def step(x, _):
            y = convolve(
                x,
                kernel,
                window_strides=(1, 1),
                padding="SAME",
                dimension_numbers=LAYOUTS[0],
                feature_group_count=4,
            )
            return lax.cond(x.sum() > 0, lambda: x + y, lambda: x - y), None

        x, _ = lax.scan(step, x, length=2)
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def test_wherever_they_are_in_a_classifier():
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    module = Depthwise()
    variables = module.init(jax.random.key(1), images)
    model = from_linen(module, variables, images)
    logits = module.apply(variables, images)
    assert count(module.apply, variables, images) == 3
    assert count(model.apply, model.params, images) == 0
    np.testing.assert_allclose(model(images).logits, logits, rtol=1e-5, atol=1e-6)
