"""Types wide enough to compute in, and checks of the numbers that users choose."""

import functools
import math
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


def to_float32_at_least(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own type if that is wider."""
    # NumPy takes integers to float64, which is float32 unless x64 is enabled.
    return x.astype(jax.dtypes.canonicalize_dtype(np.promote_types(x.dtype, np.float32)))


@overload
def to_common_float(*arrays: ArrayLike) -> tuple[jax.Array, ...]: ...
@overload
def to_common_float(*trees: Any) -> Any: ...
def to_common_float(*trees: Any) -> Any:
    """The trees with all their floating arrays in one type, the widest of them, at least float32.

    Features may come in float32 and what was fitted in float64, say. A list is an array.
    """
    leaves = jax.tree.leaves(trees, is_leaf=_is_list)
    floats = [x.dtype for x in map(jnp.asarray, leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    widest = functools.reduce(np.promote_types, floats, np.dtype(np.float32))
    dtype = jax.dtypes.canonicalize_dtype(widest)

    def widen(x: ArrayLike) -> jax.Array:
        array = jnp.asarray(x)
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(widen, trees, is_leaf=_is_list)


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def as_rows(name: str, x: ArrayLike, size: str) -> jax.Array:
    """`x` as an array of one row for each image, in float32 at least.

    Args:
        name: of the argument, for errors.
        x: `[B, size]`: a JAX or NumPy array, or lists.
        size: what the field calls the length of a row.

    Raises:
        ValueError: `x` is no array, or has other than two axes.
    """
    if hasattr(x, "logits"):
        raise ValueError(
            f"{name} must be an array [B, {size}], got {type(x).__name__}: take its .features or "
            ".logits"
        )
    if not (hasattr(x, "dtype") or isinstance(x, list | tuple)):
        raise ValueError(f"{name} must be an array [B, {size}], got {type(x).__name__}")
    array = jnp.asarray(x)
    if array.ndim != 2:
        remedy = f"; for a single image give {name}[None]" if array.ndim == 1 else ""
        raise ValueError(
            f"{name} must be [B, {size}], one row for each image, got shape {array.shape}{remedy}"
        )
    return to_float32_at_least(array)


def unit_rows(x: jax.Array) -> jax.Array:
    """`x` `[B, D]` with each row divided by its Euclidean norm; a row of zeros stays as it is."""
    x = to_float32_at_least(x)
    # Divided by its largest entry first, no row overflows or underflows when it is squared.
    x = divide_or_zero(x, jnp.abs(x).max(axis=1, keepdims=True))
    return divide_or_zero(x, jnp.linalg.norm(x, axis=1, keepdims=True))


def divide_or_zero(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, and zero where the denominator is zero."""
    is_zero = denominator == 0
    quotient = numerator / jnp.where(is_zero, jnp.ones_like(denominator), denominator)
    return jnp.where(is_zero, jnp.zeros_like(quotient), quotient)


def check_step(epsilon: Any) -> None:
    """Raises ValueError unless `epsilon` is finite and not negative; a traced one passes."""
    if isinstance(epsilon, jax.core.Tracer):
        return
    if not (is_number(epsilon) and math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and not negative, got {epsilon!r}")


def check_temperature(temperature: Any) -> None:
    """Raises ValueError unless `temperature` is positive and finite; a traced one passes."""
    if isinstance(temperature, jax.core.Tracer):
        return
    if not (is_number(temperature) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")


def check_order(ord: Any) -> None:
    """Raises ValueError unless `ord` is a number >= 0.5 or infinity."""
    if not (is_number(ord) and ord >= 0.5):
        raise ValueError(f"ord must be at least 0.5 or infinity, got {ord!r}")


def check_orders(ord: Any) -> None:
    """Raises ValueError unless `ord` is an order, as of `check_order`, or several of them."""
    if not isinstance(ord, Sequence) or isinstance(ord, str):
        check_order(ord)
        return
    if not ord:
        raise ValueError("ord is empty; give at least one order")
    for each in ord:
        check_order(each)


def is_number(value: Any) -> bool:
    """Whether `value` is a real number; a truth value is none."""
    if isinstance(value, bool | np.bool_):
        return False
    return isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
    )


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number in [0, 1)."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name} is a fraction, from 0 to below 1, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number above zero."""
    if not (is_number(value) and value == int(value) and value >= 1):
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
