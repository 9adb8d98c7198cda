"""Scores of how much of an image's last-layer gradient lies where training gradients do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import divide_or_zero
from gradnorm_jax.scores.arrays import (
    append_one,
    as_fitted_features,
    as_matrix,
    as_outputs,
    check_width,
    project,
    squared_norm,
)
from gradnorm_jax.scores.gradient import residual_norm


class Subspace(NamedTuple):
    """An affine subspace of the features.

    Attributes:
        centre: `[D]`, a point of it.
        basis: `[D, K]`, orthonormal.
    """

    centre: jax.Array
    basis: jax.Array


class CellSubspace(NamedTuple):
    """The principal subspace of class means of d z_y / d(W, b), without arrays `[C, C, D]`.

    Such a gradient is h, with an appended 1, in the predicted class's column and zero elsewhere.
    The mean over a true class therefore consists of one cell for each prediction that it has got.

    Attributes:
        cells: `[N, D + 1]`, means over the images of a true class of h where they got a prediction.
        predictions: `[N]`, the column that each cell lies in.
        coordinates: `[N, K + 1]`, what each cell's product with h adds to the coordinates in the
            subspace, and to the product with the mean gradient.
        offset: `[K]`, coordinates of the mean gradient.
        centre_norm: `[]`, squared norm of the mean gradient.
    """

    cells: jax.Array
    predictions: jax.Array
    coordinates: jax.Array
    offset: jax.Array
    centre_norm: jax.Array


class AverageGradients(NamedTuple):
    """Class means of the gradient h p^T of logsumexp z, projected from both sides.

    Attributes:
        output_basis: `[C, P]`, orthonormal; the identity unless there are more classes than P.
        feature_basis: `[D, Q]`, orthonormal; the identity unless there are more features than Q.
        means: `[K, P Q]`, of the K classes that have images, each scaled to length 1.
    """

    output_basis: jax.Array
    feature_basis: jax.Array
    means: jax.Array


def gradorth(features: ArrayLike, logits: ArrayLike, basis: ArrayLike) -> jax.Array:
    r"""GradOrth: the gradient's norm within the subspace of training features.

    .. math:: S = \|V^T \, \partial KL(u \| p) / \partial W\|_F = \|V^T h\|_2 \, \|p - u\|_2

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        basis: `[D, K]`, the V of training features, from `statistics.directions.leading_directions`
            of their second moment, which is not centred.

    Returns:
        `[B]`, nats per unit of weight, >= 0; higher is more in-distribution.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Behpour, Doan, Li, He, Gou, Ren (2023), "GradOrth: A Simple yet Efficient
        Out-of-Distribution Detection with Orthogonal Projection of Gradients".
        https://arxiv.org/abs/2308.00310. Not reproduced by anyone we found, and the authors' code
        is not public. As features are not centred and rectified ones point one way, V^T h is most
        of h, and the ranking nearly that of `gradnorm(ord=2)`: Spearman's coefficient between the
        two is 0.9996 on CIFAR-10 test images and 0.995 on textures, with a ResNet-20. Of other
        layers it is `gradorth_of_layers`.
    """
    h, z, directions = as_outputs(features, logits, as_matrix("basis", basis, "D, K"))
    return jnp.sqrt(squared_norm(project(h, directions))) * residual_norm(z, ord=2)


def gradpca(features: ArrayLike, subspace: Subspace) -> jax.Array:
    r"""GradPCA of the sum of the logits: the fraction of the gradient's square in the subspace.

    .. math:: S = \|U^T (g - \bar g)\|^2 / \|g - \bar g\|^2, \quad g = \partial \sum_c z_c /
        \partial (W, b)

    All columns of this g are h, and its entries for the bias are constant: it is the same fraction
    of h itself, and U are the principal directions of the class means of the features.

    Args:
        features: `[B, D]`.
        subspace: of class means of training features, from
            `statistics.directions.principal_subspace`.

    Returns:
        `[B]`, fractions in [0, 1]; higher is more in-distribution. 1 at the centre itself.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Seleznova, Liu, Kutyniok et al. (2025), "GradPCA: Leveraging NTK Alignment for Reliable
        Out-of-Distribution Detection", with the sum that its public code takes; the text says
        the largest logit, `gradpca_max`. https://arxiv.org/abs/2505.16017
    """
    h, (centre, basis) = as_fitted_features(features, subspace)
    check_width(h, len(centre))
    centred = h - centre[None]
    return _fraction(squared_norm(project(centred, basis)), squared_norm(centred))


def gradpca_max(features: ArrayLike, logits: ArrayLike, subspace: CellSubspace) -> jax.Array:
    r"""GradPCA of the largest logit.

    .. math:: S = \|U^T (g - \bar g)\|^2 / \|g - \bar g\|^2, \quad g = \partial z_{\hat y} /
        \partial (W, b) = (h, 1) \, e_{\hat y}^T

    Costs a product with `[D, N]`, N being how many pairs of true and predicted class training
    images have.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        subspace: of class means of training gradients, from `statistics.cells.cell_subspace`.

    Returns:
        `[B]`, fractions in [0, 1]; higher is more in-distribution. 1 at the centre itself.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Seleznova, Liu, Kutyniok et al. (2025), as its text has it.
        https://arxiv.org/abs/2505.16017
    """
    h, z, (cells, predictions, coordinates, offset, centre_norm) = as_outputs(
        features, logits, subspace
    )
    products = project(h, cells.T)
    in_column = z.argmax(axis=-1)[:, None] == predictions[None]
    products = jnp.where(in_column, products, jnp.zeros_like(products))
    at = project(products, coordinates)
    within = squared_norm(at[:, :-1] - offset[None])
    return _fraction(within, squared_norm(append_one(h)) - 2 * at[:, -1] + centre_norm)


def average_gradient(
    features: ArrayLike, logits: ArrayLike, gradients: AverageGradients
) -> jax.Array:
    r"""Largest cosine of the gradient with the mean gradient of a class.

    .. math:: S = \max_c \frac{\langle g, \bar g_c \rangle}{\|g\| \|\bar g_c\|}
        = \max_c \frac{h^T \bar G_c p}{\|h\| \|p\| \|\bar G_c\|}, \quad g = \partial L / \partial W
        = h p^T, \; L = \log \sum_c e^{z_c}, \; \bar G_c = E[h p^T | c]

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        gradients: of training images, from `statistics.average_gradients.average_gradients`.

    Returns:
        `[B]`, cosines in [-1, 1], and in [0, 1] for features that are not negative; higher is more
        in-distribution. What projections leave out of g makes it smaller. 0 for features of zero.

    Raises:
        ValueError: a shape is not as above, or not that of the network fitted to.

    References:
        Wu, Zhang, Lu et al. (2023), "Low-Dimensional Gradient Helps Out-of-Distribution Detection",
        https://arxiv.org/abs/2310.17163, for the mean gradients as a subspace. There, of all the
        network's parameters, and scores are those of a linear classifier that is trained on the
        coordinates in it; here of the last layer, and nothing is trained.
    """
    h, z, (output_basis, feature_basis, means) = as_outputs(features, logits, gradients)
    p = jax.nn.softmax(z)
    left, right = project(p, output_basis), project(h, feature_basis)
    low = (left[:, :, None] * right[:, None, :]).reshape(len(p), -1)
    products = project(low, means.T).max(axis=-1)
    return divide_or_zero(products, jnp.sqrt(squared_norm(p) * squared_norm(h)))


def _fraction(part: jax.Array, whole: jax.Array) -> jax.Array:
    # Rounding may take the one above the other.
    fraction = jnp.minimum(divide_or_zero(part, whole), 1.0)
    return jnp.where(whole > 0, fraction, jnp.ones_like(fraction))
