import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.norms import combine_norms, entrywise_norm

ORDERS = [0.5, 0.7, 1, 1.5, 2, 3, 10.0, 300, math.inf]


def reference(x, order):
    """The definition in float64 with the scale taken out, NumPy alone."""
    size = np.abs(np.asarray(x, np.float64)).reshape(len(x), -1)
    largest = size.max(axis=1)
    if math.isinf(order):
        return largest
    scale = np.where(largest > 0, largest, 1)
    return scale * ((size / scale[:, None]) ** order).sum(axis=1) ** (1 / order)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(0.5, 7 + 4 * math.sqrt(3)), (1, 7), (2, 5), (3, 91 ** (1 / 3)), (math.inf, 4)],
)
def test_by_hand(order, expected):
    x = jnp.array([[[3.0, 0.0], [0.0, -4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(entrywise_norm(x, ord=order), [expected, 0], rtol=3e-7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(3, 1), (4, 7), (2, 3, 5, 4), (3,)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_follows_the_definition_at_every_scale(order, shape, scale):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * np.float32(scale)
    np.testing.assert_allclose(
        entrywise_norm(jnp.asarray(x), ord=order), reference(x, order), rtol=5e-6
    )


@pytest.mark.parametrize("order", [0.5, 1, 2, 3.3, math.inf])
@pytest.mark.parametrize("shape", [(2, 1_300_000), (2, 3, 3, 380, 380), (2, 1300, 1000)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_sums_keep_their_digits(order, shape, dtype):
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
    norm = jax.jit(lambda x: entrywise_norm(x, ord=order))(x)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, reference(x, order), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_double_precision_is_kept(order, x64):
    x = np.random.default_rng(2).normal(size=(3, 50))
    norm = entrywise_norm(jnp.asarray(x), ord=order)
    assert norm.dtype == jnp.float64
    np.testing.assert_allclose(norm, reference(x, order), rtol=1e-13)


@pytest.mark.parametrize("order", [0.5, 1, 2, 3.3, math.inf])
def test_bad_entries_show_in_their_own_example_only(order):
    x = jnp.array([[1.0, math.inf], [1.0, math.nan], [0.0, 2.0]])
    norm = entrywise_norm(x, ord=order)
    assert norm[0] == math.inf
    assert np.isnan(norm[1])
    np.testing.assert_allclose(norm[2], 2, rtol=1e-6)


@pytest.mark.parametrize("order", [0.5, 1, 2, math.inf])
def test_no_entries_give_zero(order):
    np.testing.assert_array_equal(entrywise_norm(jnp.zeros((2, 0, 3)), ord=order), [0, 0])


def test_several_orders_stand_beside_each_other():
    x = np.random.default_rng(4).normal(size=(3, 8)).astype(np.float32)
    orders = (1, 2, math.inf)
    parts = {name: jnp.asarray(x[:, i::2]) for i, name in enumerate("ab")}
    norms = {name: entrywise_norm(part, ord=orders) for name, part in parts.items()}
    expected = np.stack([reference(x, order) for order in orders], axis=1)
    np.testing.assert_allclose(entrywise_norm(jnp.asarray(x), ord=orders), expected, rtol=2e-6)
    np.testing.assert_allclose(combine_norms(norms, ord=list(orders)), expected, rtol=2e-6)
    for wrong in (1, (1, 2)):
        with pytest.raises(ValueError, match=r"\[B, K\] of K orders; got \(3, 3\) for ord="):
            combine_norms(norms, ord=wrong)
    with pytest.raises(ValueError, match="ord is empty"):
        combine_norms(norms, ord=())


@pytest.mark.parametrize("order", [0.49, 0, -1, -math.inf, math.nan, "2", (1, 0)])
def test_orders_out_of_range_are_refused(order):
    with pytest.raises(ValueError, match=r"ord must be at least 0\.5 or infinity, got"):
        entrywise_norm(jnp.ones((2, 3)), ord=order)


@pytest.mark.parametrize("order", ORDERS)
def test_parts_combine_to_the_whole(order):
    x = np.random.default_rng(3).normal(size=(4, 12)).astype(np.float32)
    parts = {"a": jnp.asarray(x[:, :5]), "b": jnp.asarray(x[:, 5:])}
    norms = {name: entrywise_norm(part, ord=order) for name, part in parts.items()}
    np.testing.assert_allclose(combine_norms(norms, ord=order), reference(x, order), rtol=2e-6)


def test_combining_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one part"):
        combine_norms({})


@pytest.mark.parametrize("order", ORDERS)
def test_derivatives_at_zeros_are_zero(order):
    x = jnp.array([[0.0, 0.0, 0.0], [0.0, 3.0, -4.0], [1.0, 2.0, 3.0]])

    def total(x):
        return entrywise_norm(x, ord=order).sum()

    gradient = jax.grad(total)(x)
    np.testing.assert_array_equal(gradient[0], 0)
    assert gradient[1][0] == 0
    assert bool(jnp.isfinite(gradient).all())
    tangent = jax.jvp(total, (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(tangent, gradient.sum(), atol=1e-6)


@pytest.mark.parametrize("order", [1.5, 2, 3, 10.0])
def test_second_derivatives_are_finite_at_zero(order):
    hessian = jax.hessian(lambda x: entrywise_norm(x[None], ord=order)[0])
    np.testing.assert_array_equal(hessian(jnp.zeros(3)), 0)


@pytest.mark.parametrize("order", [0.5, 0.7, 1.5, 2, 3, 10.0])
def test_derivatives_are_those_of_the_definition(order, x64):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5)))

    def definition(x):
        return ((jnp.abs(x) ** order).sum(axis=1) ** (1 / order)).sum()

    def ours(x):
        return entrywise_norm(x, ord=order).sum()

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(definition)(x), rtol=1e-12)
    np.testing.assert_allclose(
        jax.hessian(ours)(x), jax.hessian(definition)(x), rtol=1e-10, atol=1e-12
    )


def test_integers():
    np.testing.assert_array_equal(entrywise_norm(jnp.array([[3, -4]]), ord=2), [5])
