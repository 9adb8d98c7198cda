import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import scores


def test_hand_computed():
    logits = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(scores.msp(logits), [0.75, 0.5], rtol=1e-6)
    np.testing.assert_allclose(scores.energy(logits), np.log([4, 2]), rtol=1e-6)
    # T = 2: 2 log(sqrt 3 + 1)
    np.testing.assert_allclose(
        scores.energy(logits, temperature=2.0)[0], 2 * np.log(np.sqrt(3) + 1), rtol=1e-6
    )
    np.testing.assert_allclose(
        scores.msp(logits, temperature=2.0)[0], np.sqrt(3) / (np.sqrt(3) + 1), rtol=1e-6
    )


def test_extreme_logits():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    np.testing.assert_allclose(scores.msp(logits), [1.0])
    np.testing.assert_allclose(scores.energy(logits), [1e4])


def linear(images):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    return images @ weights


def test_odin_without_a_step_is_tempered_msp():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_array_equal(
        scores.odin(linear, images, temperature=1000.0),
        scores.msp(linear(images), temperature=1000.0),
    )


def test_odin_steps_by_the_sign_of_each_images_own_gradient():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    expected = []
    for image in np.asarray(images):
        label = int(linear(image[None])[0].argmax())
        gradient = jax.grad(lambda x: -jax.nn.log_softmax(linear(x) / 10.0)[label])(image)  # noqa: B023
        moved = image - 0.05 * np.where(gradient >= 0, 1, -1).astype(np.float32)
        expected.append(jax.nn.softmax(linear(moved) / 10.0).max())
    actual = scores.odin(linear, images, temperature=10.0, epsilon=0.05)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert (actual > scores.odin(linear, images, temperature=10.0)).all()


def test_odin_takes_a_zero_gradient_as_positive():
    def logits_of(images):
        return jnp.concatenate([images[:, :1], -images[:, :1]], axis=1)

    # The second pixel does nothing: its gradient is zero, and its step is -epsilon.
    moved = []
    scores.odin(lambda x: moved.append(x) or logits_of(x), jnp.array([[1.0, 5.0]]), epsilon=0.5)
    np.testing.assert_allclose(moved[-1], [[1.5, 4.5]])


@pytest.mark.parametrize("score", [scores.msp, scores.energy])
def test_bad_temperature(score):
    with pytest.raises(ValueError, match="temperature must be positive"):
        score(jnp.zeros((1, 3)), temperature=0)
