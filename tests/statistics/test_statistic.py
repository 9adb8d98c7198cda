import numpy as np

from gradnorm_jax.statistics import (
    CLASS_SUMS,
    CORRECT_CLASS_SUMS,
    MOMENTS,
    PREDICTED_CLASS_SUMS,
    Examples,
    Statistic,
    learn,
    passes,
)
from gradnorm_jax.types import LinearHead

HEAD = LinearHead(np.zeros((2, 3)), np.zeros(3))


def _deviations(name, after):
    """Counts what lies above the mean feature, which is known after a first pass."""

    def init(head, moments):
        return moments.sum / moments.num_images, np.zeros(2)

    def update(value, examples):
        mean, count = value
        return mean, count + (examples.features > mean).sum(axis=0)

    def merge(left, right):
        return left[0], left[1] + right[1]

    return Statistic(name, init, update, merge, after)


ABOVE = _deviations("above the mean", (MOMENTS,))


def test_each_statistic_is_learned_once_and_after_what_it_needs():
    assert passes([]) == []
    assert passes([MOMENTS, CLASS_SUMS, MOMENTS]) == [(MOMENTS, CLASS_SUMS)]
    assert passes([ABOVE, CLASS_SUMS]) == [(MOMENTS, CLASS_SUMS), (ABOVE,)]
    third = _deviations("third", (ABOVE,))
    assert passes([third]) == [(MOMENTS,), (ABOVE,), (third,)]


def test_a_later_pass_is_given_what_an_earlier_one_has_learned():
    features = np.array([[0.0, 1.0], [0.0, 2.0], [6.0, 3.0]])
    logits, labels = np.zeros((3, 3)), np.array([0, 1, 2])
    examples = Examples(features, logits, labels, np.arange(3))
    halves = [Examples(*(x[rows] for x in examples)) for rows in (slice(1), slice(1, None))]
    for blocks in ([examples], halves):
        known = learn([ABOVE], HEAD, blocks)
        assert set(known) == {MOMENTS, ABOVE}
        np.testing.assert_array_equal(known[ABOVE][0], [2, 2])
        np.testing.assert_array_equal(known[ABOVE][1], [1, 1])


def test_classes_are_told_apart_by_label_prediction_and_both():
    features = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    logits = np.eye(3)[[0, 0, 2]]
    examples = Examples(features, logits, np.array([0, 1, 2]), np.arange(3))
    kinds = (CLASS_SUMS, PREDICTED_CLASS_SUMS, CORRECT_CLASS_SUMS)
    known = learn(kinds, HEAD, [examples])
    by_label, by_prediction, correct = map(known.get, kinds)
    np.testing.assert_array_equal(by_label.sums, features)
    np.testing.assert_array_equal(by_prediction.sums, [[4, 6], [0, 0], [5, 6]])
    np.testing.assert_array_equal(by_prediction.counts, [2, 0, 1])
    np.testing.assert_array_equal(correct.sums, [[1, 2], [0, 0], [5, 6]])
