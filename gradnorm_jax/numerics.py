"""Types wide enough to compute in, and checks of the numbers that users choose."""

import math
from typing import Any

import jax
import numpy as np


def to_float32_at_least(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own type if that is wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


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


def is_number(value: Any) -> bool:
    """Whether `value` is a real number; a truth value is none."""
    if isinstance(value, bool | np.bool_):
        return False
    return isinstance(value, int | float | np.number) or (
        isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
    )
