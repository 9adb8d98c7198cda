"""The structure of what a detector has learned as JSON, beside its arrays; nothing is pickled."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gradnorm_jax.references import is_reference, load_reference
from gradnorm_jax.tree import Params

Layout = Any
"""JSON: null, the name of an array, or {kind: parts}."""


def to_layout(state: Any) -> tuple[Layout, dict[str, np.ndarray]]:
    """The layout of a pytree of None, arrays, dicts, lists, tuples and NamedTuples; its arrays.

    Raises:
        ValueError: something else is in it.
    """
    arrays: dict[str, np.ndarray] = {}

    def describe(tree: Any) -> Layout:
        match tree:
            case None:
                return None
            case dict() if all(isinstance(key, str) for key in tree):
                return {"dict": {key: describe(each) for key, each in tree.items()}}
            case list():
                return {"list": [describe(each) for each in tree]}
            case tuple() if hasattr(tree, "_fields"):
                parts = {name: describe(getattr(tree, name)) for name in tree._fields}
                return {"namedtuple": parts, "class": _class_name(type(tree))}
            case tuple():
                return {"tuple": [describe(each) for each in tree]}
            case np.ndarray() | np.generic() | jax.Array() if not _is_odd(tree.dtype):
                name = str(len(arrays))
                arrays[name] = np.asarray(tree)
                return name
        raise ValueError(
            f"what the detector has learned holds a {type(tree).__name__}, and files hold arrays "
            "in dicts with texts as keys, lists, tuples and NamedTuples of a module"
        )

    return describe(state), arrays


def from_layout(
    layout: Layout, arrays: Mapping[str, np.ndarray], allow: Callable[[str], None]
) -> Params:
    """The inverse of `to_layout`.

    Args:
        layout: where each array is.
        arrays: all of them, each of which must be used once.
        allow: raises ValueError for modules, other than this library's, not to be imported.

    Raises:
        ValueError: the layout is not one, or is not that of the arrays.
    """
    left = dict(arrays)

    def build(layout: Layout) -> Any:
        match layout:
            case None:
                return None
            case str() if layout in left:
                return jax.numpy.asarray(left.pop(layout))
            case {"dict": dict(parts), **rest} if not rest:
                return {key: build(each) for key, each in parts.items()}
            case {"list": list(parts), **rest} if not rest:
                return [build(each) for each in parts]
            case {"tuple": list(parts), **rest} if not rest:
                return tuple(build(each) for each in parts)
            case {"namedtuple": dict(parts), "class": str(name), **rest} if not rest:
                return _load_class(name, tuple(parts), allow)(*map(build, parts.values()))
        raise ValueError("what the detector has learned is not laid out as it should be")

    state = build(layout)
    if left:
        raise ValueError(f"{len(left)} arrays have no place in what the detector has learned")
    return state


def _is_odd(dtype: Any) -> bool:
    # Keys of random generators, objects, texts.
    return not (isinstance(dtype, np.dtype) and dtype.kind in "biufcV" and dtype.names is None)


def _class_name(kind: type) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not is_reference(name) or load_reference(name) is not kind:
        raise ValueError(f"{name} cannot be found by its name: define it in a module")
    return name


def _load_class(name: str, fields: tuple[str, ...], allow: Callable[[str], None]) -> Any:
    module = name.partition(":")[0]
    if module.partition(".")[0] != "gradnorm_jax":
        allow(module)
    try:
        kind = load_reference(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, tuple)):
        raise ValueError(f"{name} is no NamedTuple")
    if getattr(kind, "_fields", None) != fields:
        raise ValueError(
            f"{name} has other fields than {', '.join(fields)}: the file is of another version of "
            f"{module}; calibrate again"
        )
    return kind
