"""What scores have in common: checked inputs, products to full precision, the softmax's spread."""

from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.losses import softmax_minus_target
from gradnorm_jax.numerics import as_rows, to_common_float, to_float32_at_least


def as_outputs(features: ArrayLike, logits: ArrayLike, *state: Any) -> Any:
    """Features `[B, D]`, logits `[B, C]` and what was fitted, all of one floating type.

    Raises:
        ValueError: features or logits are not rows, or not equally many.
    """
    rows, outputs = as_rows("features", features, "D"), as_rows("logits", logits, "C")
    if len(rows) != len(outputs):
        raise ValueError(
            "features and logits must have a row for each image, got shapes "
            f"{rows.shape} and {outputs.shape}"
        )
    return to_common_float(rows, outputs, *state)


def as_fitted_features(features: ArrayLike, *state: Any) -> Any:
    """Features `[B, D]` and what was fitted, all of one floating type.

    Raises:
        ValueError: features are not rows.
    """
    return to_common_float(as_rows("features", features, "D"), *state)


def as_matrix(name: str, x: ArrayLike, shape: str) -> jax.Array:
    """`x` as a matrix in float32 at least; ValueError, with its name and shape, if it is none."""
    matrix = jnp.asarray(x)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be [{shape}], got shape {matrix.shape}")
    return to_float32_at_least(matrix)


def project(features: jax.Array, matrix: jax.Array) -> jax.Array:
    """The product of features `[B, D]` with `[D, R]` to full precision, which a TPU must be told.

    A matrix of one more row is one for features to which a constant 1 is appended, by which a bias
    is multiplied.

    Raises:
        ValueError: the matrix is for features of another size.
    """
    if len(matrix) == features.shape[1] + 1:
        return project(append_one(features), matrix)
    check_width(features, len(matrix))
    return jnp.matmul(features, matrix, precision=jax.lax.Precision.HIGHEST)


def check_width(features: jax.Array, width: int) -> None:
    """Raises ValueError unless features `[B, D]` have D = width."""
    if features.shape[1] != width:
        raise ValueError(
            f"features have {features.shape[1]} entries, but what is fitted or given is for "
            f"{width}: take features of the same network"
        )


def append_one(features: jax.Array) -> jax.Array:
    """Features `[B, D + 1]`, the last of them the constant by which a bias is multiplied."""
    return jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)


def squared_norm(x: jax.Array) -> jax.Array:
    """Squared 2-norm of each row: `[B, N] -> [B]`."""
    return (x**2).sum(axis=-1)


def softmax_minus_prediction(logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """The difference p - e_y of softmax(logits / T) and its largest entry's one-hot `[B, C]`."""
    one_hot = jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[-1], dtype=logits.dtype)
    return softmax_minus_target(logits, one_hot, temperature=temperature)
