"""Named arguments of a model's call: arrays ride as leaves, all else as a key."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gradnorm_jax.adapters.keys import Static, static

_ARRAY = "<array>"


def split_arguments(arguments: Mapping[str, Any]) -> tuple[Static, list[Any]]:
    """The arguments without their arrays, and these."""
    leaves, structure = jax.tree.flatten(dict(arguments))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    rest = [_ARRAY if _is_array(leaf) else leaf for leaf in leaves]
    is_array = [_is_array(leaf) for leaf in leaves]
    return static((structure, rest, is_array)), arrays


def join_arguments(rest: Static, arrays: list[Any]) -> dict[str, Any]:
    """The arguments that were split."""
    structure, leaves, is_array = rest.value
    remaining = iter(arrays)
    joined = [
        next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)
    ]
    arguments: dict[str, Any] = jax.tree.unflatten(structure, joined)
    return arguments


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
