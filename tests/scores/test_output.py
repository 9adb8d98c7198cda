import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax import scores
from gradnorm_jax.types import Outputs


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


@pytest.mark.parametrize("score", [scores.msp, scores.energy])
def test_shapes_and_types(score):
    with pytest.raises(ValueError, match=r"logits must be \[B, C\].*give logits\[None\]"):
        score(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"one row for each image, got shape \(2, 3, 4\)$"):
        score(jnp.zeros((2, 3, 4)))
    rows = [[1, 2], [3, 5]]
    expected = score(jnp.array(rows, jnp.float32))
    for convert in (list, np.array, jnp.array):
        np.testing.assert_array_equal(score(convert(rows)), expected)
    assert score(rows).dtype == jnp.float32


@pytest.mark.parametrize("epsilon", [-0.1, np.nan, np.inf, "foo", True])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match="epsilon must be finite and not negative, got"):
        scores.odin(linear, jnp.ones((2, 4)), epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(
    ("logits_of", "message"),
    [
        (lambda x: Outputs(x, linear(x)), r"got Outputs: take its \.features or \.logits"),
        (lambda x: {"logits": linear(x)}, "what logits_of returns must be an array .* got dict"),
        (lambda x: linear(x)[0], r"what logits_of returns must be \[B, C\]"),
        (lambda x: linear(x)[:1], r"a row \[C\] for each image, got shape \(1, 3\) for images"),
    ],
)
def test_odin_of_what_gives_no_logits(logits_of, message, epsilon):
    with pytest.raises(ValueError, match=message):
        scores.odin(logits_of, jnp.ones((2, 4)), epsilon=epsilon)


def test_odin_takes_numpy_images_and_a_traced_step_but_no_integers():
    images = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    expected = scores.odin(linear, jnp.asarray(images), epsilon=0.1)
    traced = jax.jit(lambda epsilon: scores.odin(linear, images, epsilon=epsilon))(0.1)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"images must be floats to take a step.*uint8"):
        scores.odin(linear, np.ones((2, 4), np.uint8), epsilon=0.1)
