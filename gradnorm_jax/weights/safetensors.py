"""`.safetensors` files, of any framework."""

import re
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from gradnorm_jax.extras import needs_extra
from gradnorm_jax.weights.stored import Checkpoint, Stored

_KINDS = {"F": "float", "I": "int", "U": "uint", "BF": "bfloat", "C": "complex"}


def open_safetensors(path: Path) -> Stored:
    """A `.safetensors` file, of which the headers are read."""
    with needs_extra("data", ".safetensors files"):
        from safetensors import safe_open
    try:
        # Headers that claim more, or less, than the file holds are refused.
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            headers = {
                key: jax.ShapeDtypeStruct(tuple(each.get_shape()), _dtype(each.get_dtype()))
                for key, each in slices.items()
            }
    except Exception as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error

    def read(keys: Iterable[str]) -> Checkpoint:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in keys}

    return Stored(headers, read)


def _dtype(name: str) -> jnp.dtype:
    if name == "BOOL":
        return jnp.dtype(bool)
    found = re.fullmatch(r"([A-Z]+)(\d+)", name)
    if found is None or found[1] not in _KINDS:
        raise ValueError(f"it holds numbers of type {name}")
    return jnp.dtype(_KINDS[found[1]] + found[2])
