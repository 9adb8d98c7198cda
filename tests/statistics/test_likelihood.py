import numpy as np
import pytest
from scipy import optimize, special

from gradnorm_jax.statistics.likelihood import best_temperature, likelihood


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.3, 20.0])
def test_the_temperature_is_that_of_the_largest_likelihood(scale):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 6))
    labels = np.array([rng.choice(6, p=p) for p in special.softmax(1.7 * logits, axis=1)])
    logits = scale * logits

    def loss(log_t):
        log_p = special.log_softmax(logits / np.exp(log_t), axis=1)
        return -log_p[np.arange(400), labels].mean()

    options = {"xatol": 1e-10}
    best = optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded", options=options)
    assert best_temperature(likelihood(logits, labels)) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_hand_computed():
    # Right three times of four, with a margin of 1: the odds are e^(1/T) = 3.
    logits, labels = np.array([[1.0, 0.0]] * 4), np.array([0, 0, 0, 1])
    assert best_temperature(likelihood(logits, labels)) == pytest.approx(1 / np.log(3), rel=1e-5)


def test_where_no_temperature_is_best_the_outermost_is():
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert best_temperature(likelihood(logits, np.array([0, 1]))) == 1 / 64
    assert best_temperature(likelihood(logits, np.array([1, 0]))) == 64


def test_labels_are_needed():
    with pytest.raises(ValueError, match=r"1 training images have labels outside of 0\.\.1 .* -1"):
        likelihood(np.zeros((2, 2)), np.array([0, -1]))
    with pytest.raises(ValueError, match="no labelled training images"):
        best_temperature(likelihood(np.zeros((0, 2)), np.zeros(0, int)))
