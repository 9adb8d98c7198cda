"""Gradients of convolutions' kernels as products, against JAX's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradnorm_jax.kernel_gradients import (
    count_entries_of_factors,
    factors,
    kernel_gradient,
    kernel_gradient_entries,
)

# The kernel's extent, its channels, what else a convolution can be told; and whether rows are
# shifted in the cotangent, for which they must not be strided, and worth it.
CASES = {
    "same": ((3, 3, 4, 4), {"padding": "SAME"}, True),
    "valid": ((2, 3, 4, 4), {"padding": "VALID"}, True),
    "dilated kernel": ((3, 2, 4, 5), {"padding": [(3, 1), (0, 2)], "rhs_dilation": (2, 3)}, True),
    "cropped": ((3, 3, 4, 4), {"padding": [(-1, 1), (1, 0)]}, True),
    "strided columns": ((3, 3, 4, 4), {"padding": "SAME", "window_strides": (1, 2)}, True),
    "dilated columns": ((3, 3, 4, 4), {"padding": [(1, 1)] * 2, "lhs_dilation": (1, 2)}, True),
    "strided rows": ((3, 3, 4, 4), {"padding": "SAME", "window_strides": (2, 1)}, False),
    "dilated rows": ((3, 3, 4, 4), {"padding": [(1, 1)] * 2, "lhs_dilation": (2, 1)}, False),
    "many outputs": ((3, 3, 1, 16), {"padding": "SAME"}, False),
    "as large as the input": ((7, 6, 4, 4), {"padding": "VALID"}, False),
    "single weights": ((1, 1, 4, 4), {"padding": "SAME"}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_one_product_is_the_gradient(case, x64):
    shape, options, rows_of_cotangent = CASES[case]
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(2, 7, 6, shape[2])), generator.normal(size=shape)
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    convolve = functools.partial(lax.conv_general_dilated, **options)
    (equation,) = jax.make_jaxpr(convolve)(x, kernel).eqns
    parameters = equation.params

    @jax.jit
    def gradients(x, kernel):
        y, pull_back = jax.vjp(lambda kernel: convolve(x, kernel), kernel)
        g = jnp.cos(y)
        product = functools.partial(kernel_gradient, x, kernel, g, parameters)
        entries = kernel_gradient_entries(x, kernel, g, parameters)
        return pull_back(g)[0], product(joined=True), product(), entries

    expected, joined, by_offset, entries = gradients(x, kernel)
    np.testing.assert_allclose(joined, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(by_offset, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(np.sort(entries, axis=None), np.sort(joined, axis=None), rtol=1e-11)
    y = equation.outvars[0].aval
    f, g = jax.eval_shape(functools.partial(factors, parameters=parameters), x, kernel, y)
    assert count_entries_of_factors(x, kernel, parameters) == f.size + g.size
    assert (g.shape[-1] > y.shape[-1]) == rows_of_cotangent
