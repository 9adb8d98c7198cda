import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance

from gradnorm_jax import scores
from gradnorm_jax.statistics import class_sums, moments, tied_gaussians


def gaussians_of(features, labels, num_classes):
    return tied_gaussians(moments(features), class_sums(features, labels, num_classes))


def labelled_features(num_images=200, num_features=6, num_classes=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(num_classes, size=num_images)
    means = rng.normal(size=(num_classes, num_features)) * 3
    mixing = rng.normal(size=(num_features, num_features))
    return means[labels] + rng.normal(size=(num_images, num_features)) @ mixing + 50, labels


def reference(train, labels, test):
    means = np.stack([train[labels == c].mean(axis=0) for c in np.unique(labels)])
    centred = np.concatenate(
        [train[labels == c] - m for c, m in zip(np.unique(labels), means, strict=True)]
    )
    precision = EmpiricalCovariance(assume_centered=True).fit(centred).precision_
    difference = test[:, None] - means[None]
    return -np.einsum("nkd,de,nke->nk", difference, precision, difference).min(axis=1)


def test_equals_the_definition_with_scikit_learns_precision(x64):
    train, labels = labelled_features()
    test = train[:20] + np.random.default_rng(1).normal(size=(20, 6))
    gaussians = gaussians_of(train, labels, 4)
    actual = scores.mahalanobis(jnp.asarray(test), gaussians)
    np.testing.assert_allclose(actual, reference(train, labels, test), rtol=1e-8)


def test_float32_features_far_from_the_origin():
    train, labels = labelled_features()
    gaussians = gaussians_of(train, labels, 4)
    actual = scores.mahalanobis(jnp.asarray(train, jnp.float32), gaussians)
    np.testing.assert_allclose(actual, reference(train, labels, train), rtol=3e-4, atol=3e-4)


def test_hand_computed(x64):
    # Two classes at +-10 with unit variance within each: the distance of 13 is (13 - 10)^2.
    features = np.array([[9.0], [11.0], [-9.0], [-11.0]])
    gaussians = gaussians_of(features, np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(
        scores.mahalanobis(jnp.array([[13.0], [-10.0]]), gaussians), [-9, 0], atol=1e-12
    )


def test_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(1,\)"):
        class_sums(np.ones((2, 3)), np.array([0]), 4)
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(1,\)"):
        class_sums(np.ones(3), np.array([0]), 4)


def test_fewer_images_than_features_uses_the_pseudo_inverse(x64):
    train, labels = labelled_features(num_images=12, num_features=30, num_classes=3)
    gaussians = gaussians_of(train, labels, 3)
    assert gaussians.whitening.shape[1] <= 12
    np.testing.assert_allclose(
        scores.mahalanobis(jnp.asarray(train), gaussians),
        reference(train, labels, train),
        rtol=1e-6,
    )


def test_classes_without_images_are_never_the_nearest():
    train, labels = labelled_features(num_classes=3)
    few = gaussians_of(train, labels, 3)
    many = gaussians_of(train, labels, 1000)
    np.testing.assert_array_equal(few.means, many.means)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_named(label):
    with pytest.raises(ValueError, match=rf"1 training images have labels .* {label}"):
        class_sums(np.ones((2, 3)), np.array([0, label]), 4)


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="no labelled training images"):
        gaussians_of(np.ones((0, 3)), np.zeros(0, int), 4)
    with pytest.raises(ValueError, match="do not vary"):
        gaussians_of(np.ones((2, 3)), np.array([0, 1]), 4)


def test_features_of_another_size():
    train, labels = labelled_features()
    gaussians = gaussians_of(train, labels, 4)
    with pytest.raises(ValueError, match=r"features have 5 entries, but .* fitted to 6"):
        scores.mahalanobis(np.ones((2, 5)), gaussians)
    with pytest.raises(ValueError, match=r"for a single image give features\[None\]"):
        scores.mahalanobis(np.ones(6), gaussians)
