"""PyTorch's files, read by PyTorch itself in the way that runs nothing that is in them."""

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.extras import needs_extra
from gradnorm_jax.weights.stored import Checkpoint, Stored, readable, unwrap

_REMEDY = "save the module's state_dict() with torch.save"


def open_torch(path: Path) -> Stored:
    """A state dict, by itself or in the entry `state_dict` or `model` of what a script saved."""
    with needs_extra(
        "torch", "PyTorch's weights files, unless converted by `gradnorm-jax convert` elsewhere,"
    ):
        import torch
    with readable(path, _REMEDY), warnings.catch_warnings(action="ignore"):
        # Mapped, the headers alone are read. Files from before PyTorch 1.6 are read as a whole.
        mapped = zipfile.is_zipfile(path)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            raise ValueError(_reason(str(error)) or type(error).__name__) from error
        tensors = _tensors(unwrap(saved))
        headers = {key: _header(tensor) for key, tensor in tensors.items()}

    def read(keys: Iterable[str]) -> Checkpoint:
        with readable(path, _REMEDY):
            return {key: _to_numpy(tensors[key]) for key in keys}

    return Stored(headers, read)


def _reason(message: str) -> str:
    """Why PyTorch refuses a file, without its pages of advice, some of which is dangerous."""
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", message):
        return f"it holds a pickled {found[1]}"
    if "TorchScript" in message:
        return "it is a TorchScript archive"
    if "Weights only load failed" in message:
        return "it is no file of torch.save"
    return message.partition("\n")[0].partition(". ")[0]


def _tensors(saved: Any) -> dict[str, Any]:
    import torch

    if not isinstance(saved, Mapping):
        raise ValueError(f"it holds a {type(saved).__name__}, which is no state dict")
    for key, value in saved.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor)):
            raise ValueError(
                f"it is no state dict: the entry {key!r} is of type {type(value).__name__}"
            )
    return dict(saved)


def _header(tensor: Any) -> jax.ShapeDtypeStruct:
    import torch

    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not dense:
        raise ValueError("it holds tensors that are sparse, quantised or empty")
    return jax.ShapeDtypeStruct(
        tuple(tensor.shape), jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    )


def _to_numpy(tensor: Any) -> np.ndarray:
    dtype = _header(tensor).dtype
    # NumPy has no bfloat16 of its own, and float32 holds all of its numbers.
    tensor = tensor.detach().float() if dtype == jnp.bfloat16 else tensor.detach()
    # A copy, so that nothing hangs on the file any more.
    return np.array(tensor.numpy())
