"""What every format of weights files is opened as, and the names that their arrays go by."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradnorm_jax.tree import leaves_by_name

Checkpoint = dict[str, np.ndarray]
"""The arrays of a weights file by their keys."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "state")
"""Under which entry, beside epochs and optimisers, training scripts save what they trained."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An opened weights file.

    Attributes:
        headers: shape and type of each array by its key in the file.
        read: the arrays of these keys.
    """

    headers: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[Iterable[str]], Checkpoint]


def stored_arrays(arrays: Mapping[str, Any]) -> Stored:
    """Arrays in memory as an opened file."""
    headers = {key: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for key, x in arrays.items()}
    return Stored(headers, lambda keys: {key: np.asarray(arrays[key]) for key in keys})


def unwrap(tree: Any) -> Any:
    """What is trained, of all that a training script saved: the entry of `WRAPPERS`, if any."""
    while isinstance(tree, Mapping):
        inner = next((tree[key] for key in WRAPPERS if isinstance(tree.get(key), Mapping)), None)
        if inner is None:
            return tree
        tree = inner
    return tree


def flax_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of Flax's variables, or of a training state that holds them, by their paths.

    `params` and `batch_stats` are told apart by the ends of their paths, and so are merged. What is
    beside them, such as an optimiser's state, is none of the weights.
    """
    leaves = leaves_by_name(unwrap(tree))
    return {name: leaves[key] for name, key in plain_names(leaves).items()}


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """The names of weights by which layouts know them, with the keys that stand for them.

    Of Flax's variables `params/...` and `batch_stats/...`, where there are any, what follows; other
    keys beside them, an optimiser's, are left out. Of PyTorch's, what follows `module.` or
    `_orig_mod.`, which are in front of all keys of a wrapped module. Its `num_batches_tracked`,
    counters that do nothing after training, are left out.

    Raises:
        ValueError: two keys differ in nothing else.
    """
    keys = [key for key in keys if not re.search(r"(^|\.)num_batches_tracked$", key)]
    fronts = ("module.", "_orig_mod.")
    if any(key.startswith("params/") for key in keys):
        fronts = ("params/", "batch_stats/")
        keys = [key for key in keys if key.startswith(fronts)]
    named = {key: key for key in keys}
    while named and all(name.startswith(fronts) for name in named.values()):
        named = {key: name[len(_front(name, fronts)) :] for key, name in named.items()}
    names: dict[str, str] = {}
    for key, name in named.items():
        if name in names:
            raise ValueError(f"the checkpoint holds {name!r} twice: {names[name]!r} and {key!r}")
        names[name] = key
    return names


def _front(name: str, fronts: tuple[str, ...]) -> str:
    return next(front for front in fronts if name.startswith(front))


@contextlib.contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Turns whatever its body raises into a ValueError of one sentence that ends in the remedy."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        # Damage makes readers raise nearly anything: errors of zipfile, zlib, lzma, pickle and
        # tokenize, EOFError, NotImplementedError, MemoryError, which share no narrower base.
        # TensorStore's, which reads what Orbax wrote, come with pages of details in brackets.
        reason = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec=")[0]
        raise ValueError(
            f"{path} cannot be read without unpickling or repair: "
            f"{reason or type(error).__name__}; {remedy}"
        ) from error
