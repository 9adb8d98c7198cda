import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import losses


def exact(logits, temperature):
    """KL(u || p) and p - u in extended precision, straight from the definition."""
    scaled = np.asarray(logits).astype(np.longdouble) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    total = np.exp(scaled).sum(axis=-1, keepdims=True)
    log_p = scaled - np.log(total)
    uniform = 1 / np.longdouble(scaled.shape[-1])
    return -log_p.mean(axis=-1) + np.log(uniform), np.exp(scaled) / total - uniform


def relative_error(actual, expected):
    difference = np.abs(np.asarray(actual) - expected).sum(axis=-1)
    return float((difference / np.abs(expected).sum(axis=-1)).max())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("num_classes", [10, 1000, 21843])
def test_gradient_does_not_cancel_in_float32(num_classes, scale, temperature):
    logits = np.random.default_rng(0).normal(size=(3, num_classes)).astype(np.float32) * scale
    _, residual = exact(logits, temperature)
    gradient = jax.grad(lambda z: losses.kl_to_uniform(z, temperature=temperature).sum())(
        jnp.asarray(logits)
    )
    assert relative_error(gradient * temperature, residual) < 2e-6
    direct = losses.softmax_minus_uniform(jnp.asarray(logits), temperature=temperature)
    assert relative_error(direct, residual) < 2e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equals_the_definition_in_float64(x64, scale, temperature):
    logits = np.random.default_rng(1).normal(size=(4, 1000)) * scale
    divergence, residual = exact(logits, temperature)
    actual = losses.kl_to_uniform(jnp.asarray(logits), temperature=temperature)
    np.testing.assert_allclose(actual, divergence.astype(float), rtol=1e-9, atol=1e-15)
    gradient = jax.vmap(jax.grad(lambda z: losses.kl_to_uniform(z, temperature=temperature)))(
        jnp.asarray(logits)
    )
    assert relative_error(gradient * temperature, residual) < 1e-13


def test_derivative_rule_agrees_with_plain_autodiff(x64):
    def plain(z):
        return -jax.nn.log_softmax(z / 2.0).mean() - np.log(z.size)

    def ours(z):
        return losses.kl_to_uniform(z, temperature=2.0)

    logits = jnp.asarray(np.random.default_rng(2).normal(size=7) * 3)
    np.testing.assert_allclose(ours(logits), plain(logits), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(plain)(logits), rtol=1e-12)
    np.testing.assert_allclose(
        jax.hessian(ours)(logits), jax.hessian(plain)(logits), rtol=1e-11, atol=1e-15
    )


def test_hand_computed_value():
    # p = (3/4, 1/4): KL = -(log 3/4 + log 1/4) / 2 - log 2
    logits = jnp.log(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(losses.kl_to_uniform(logits), 0.14384104, rtol=1e-6)
    np.testing.assert_allclose(losses.softmax_minus_uniform(logits), [0.25, -0.25], rtol=1e-6)


def test_zero_only_for_uniform():
    assert losses.kl_to_uniform(jnp.full((1000,), 7.5)) == 0
    assert losses.kl_to_uniform(jnp.zeros(1000).at[3].set(0.1)) > 0


def test_extreme_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e38, 0.0, -1e38]])
    value, gradient = jax.vmap(jax.value_and_grad(losses.kl_to_uniform))(logits)
    assert bool(jnp.isfinite(value).all())
    np.testing.assert_allclose(gradient[0], [2 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)


def test_bfloat16_is_accumulated_in_float32():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 1000)), jnp.bfloat16)
    narrow = losses.kl_to_uniform(logits)
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, losses.kl_to_uniform(logits.astype(jnp.float32)))


def test_cross_entropy_with_uniform_target_differs_by_a_constant():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(5, 10)), jnp.float32)
    uniform = jnp.full((5, 10), 0.1)
    difference = losses.cross_entropy(logits, uniform) - losses.kl_to_uniform(logits)
    np.testing.assert_allclose(difference, np.log(10), rtol=1e-5)


@pytest.mark.parametrize("margin", [1.0, 17.0, 50.0])
def test_gradient_of_cross_entropy_does_not_cancel_in_float32(margin):
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(3, 1000)), jnp.float32)
    logits = logits.at[:, 7].set(margin + 4)
    for target in (jax.nn.one_hot(jnp.full(3, 7), 1000), jax.nn.one_hot(jnp.full(3, 8), 1000)):
        gradient = jax.grad(lambda z, q: losses.cross_entropy(z, q).sum())(logits, target)
        with jax.enable_x64(True):
            wide, q = (jnp.asarray(np.asarray(x, np.float64)) for x in (logits, target))
            others = jnp.where(q == 1, 0, jax.nn.softmax(wide))
            residual = jnp.where(q == 1, -others.sum(axis=-1, keepdims=True), others)
            expected = np.asarray(residual)
        assert relative_error(gradient, expected) < 1e-6
        direct = losses.softmax_minus_target(logits, target)
        assert relative_error(direct, expected) < 1e-6


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_derivatives_of_cross_entropy_are_those_of_plain_autodiff(x64, scale):
    rng = np.random.default_rng(6)
    logits, target = jnp.asarray(rng.normal(size=7) * scale), jnp.asarray(rng.random(7))

    def plain(z, q):
        return -(q * jax.nn.log_softmax(z / 2.0)).sum()

    def ours(z, q):
        return losses.cross_entropy(z, q, temperature=2.0)

    # Not a distribution, on purpose: the derivative is that of the formula all the same.
    for q in (target, target / target.sum(), 0 * target, jnp.zeros(7).at[2].set(1.0)):
        np.testing.assert_allclose(ours(logits, q), plain(logits, q), rtol=1e-13)
        for derivative, rtol in ((jax.grad, 1e-12), (jax.hessian, 1e-10)):
            np.testing.assert_allclose(
                derivative(ours)(logits, q), derivative(plain)(logits, q), rtol=rtol, atol=1e-14
            )
    assert not jax.grad(ours, argnums=1)(logits, target).any()


def test_targets_of_huge_logits_stay_finite():
    logits = jnp.array([[1e38, 0.0, -1e38], [3e38, -3e38, 0.0]])
    residual = losses.softmax_minus_target(logits, jnp.array([[0.0, 1.0, 0.0]] * 2))
    np.testing.assert_array_equal(residual, [[1, -1, 0]] * 2)


def test_cross_entropy_hand_computed():
    logits = jnp.log(jnp.array([3.0, 1.0]))
    one_hot = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(losses.cross_entropy(logits, one_hot), np.log(4), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got"):
        losses.kl_to_uniform(jnp.zeros(3), temperature=temperature)


def test_traced_temperature():
    value = jax.jit(lambda t: losses.kl_to_uniform(jnp.arange(3.0), temperature=t))(2.0)
    np.testing.assert_allclose(value, losses.kl_to_uniform(jnp.arange(3.0), temperature=2.0))
