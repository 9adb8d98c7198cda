"""Trees of parameters: paths to their leaves, and which leaves a selection names."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
"""A pytree of arrays."""

Path = tuple[str | int, ...]
"""Keys that lead from the root of a parameter tree to a leaf."""

Select = None | str | Sequence[str] | Callable[[str], bool]
"""All leaves (None), those under any of some path patterns, or those whose path is approved."""

_LISTED = 12


def leaf_path(entries: tuple[Any, ...]) -> Path:
    """The path of a leaf, from the entries that `jax.tree_util` gives with it."""
    return tuple(map(_key, entries))


def _key(entry: Any) -> str | int:
    match entry:
        case jax.tree_util.DictKey(key=key) | jax.tree_util.FlattenedIndexKey(key=key):
            return key if isinstance(key, int) else str(key)
        case jax.tree_util.SequenceKey(idx=index):
            return int(index)
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
    return str(entry)


def leaves_by_path(params: Params) -> dict[Path, Any]:
    """The leaves of a tree, in its order, by their paths."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def get_leaf(params: Params, path: Path) -> Any:
    """The leaf of `params` at `path`; KeyError that lists the leaves if there is none."""
    leaves = leaves_by_path(params)
    if path not in leaves:
        listed = listing([show_path(each) for each in leaves])
        raise KeyError(f"there is no parameter {show_path(path)}; there are: {listed}")
    return leaves[path]


def replace_leaf(params: Params, path: Path, value: Any) -> Params:
    """A tree like `params` with `value` in place of the leaf at `path`."""
    return jax.tree_util.tree_map_with_path(
        lambda entries, leaf: value if leaf_path(entries) == path else leaf, params
    )


def show_path(path: Path) -> str:
    """A path as users write it, its keys joined by '/'."""
    return "/".join(map(str, path))


def leaves_by_name(params: Params) -> dict[str, Any]:
    """The leaves of a tree by their path, the keys on the way joined by '/'."""
    leaves = leaves_by_path(params)
    named = {show_path(path): leaf for path, leaf in leaves.items()}
    if len(named) < len(leaves):
        raise ValueError(
            "two parameters have the same path when their keys are joined by '/': "
            f"{listing(tuple(named))}; rename the key with a '/' in it"
        )
    return named


def tree_like(params: Params, values: Mapping[str, Any]) -> Any:
    """A tree like `params` of the values by path, with None for the leaves that have none."""
    return jax.tree.unflatten(
        jax.tree.structure(params), [values.get(path) for path in leaves_by_name(params)]
    )


def non_finite(params: Params, *, allow_infinity: bool = False) -> list[str]:
    """The names of the leaves in which a number is NaN or, unless that is allowed, infinite."""
    test = (lambda x: ~np.isnan(x)) if allow_infinity else np.isfinite
    return [
        name
        for name, leaf in leaves_by_name(params).items()
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
        and not test(np.asarray(leaf)).all()
    ]


def selected_paths(params: Params, select: Select = None) -> tuple[str, ...]:
    """Paths of the selected leaves, in the order of the tree.

    Args:
        params: the pytree of parameters.
        select: None for every leaf; a pattern such as "head", "block4/*" or "*/kernel", or several;
            or a predicate on the path. `*` stands for any text, '/' included. A pattern that
            matches a subtree selects all its leaves.

    Raises:
        ValueError: a pattern, or the predicate, matches nothing, or there are no parameters.
        TypeError: a selected leaf holds no real or complex numbers.
    """
    leaves = leaves_by_name(params)
    if not leaves:
        raise ValueError("params has no leaves; give the parameters that loss_fn takes")
    selected = _choose(tuple(leaves), select)
    for path in selected:
        dtype = jnp.result_type(leaves[path])
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"Parameter {path} has dtype {dtype} and is not differentiable; exclude it (select)"
            )
    return selected


def _choose(paths: tuple[str, ...], select: Select) -> tuple[str, ...]:
    if select is None:
        return paths
    if callable(select):
        chosen = {path for path in paths if select(path)}
        if not chosen:
            raise ValueError(f"select matched no parameters; there are: {listing(paths)}")
        return tuple(path for path in paths if path in chosen)
    patterns = [select] if isinstance(select, str) else list(select)
    if not patterns:
        raise ValueError(f"select is empty and so matched no parameters: {listing(paths)}")
    for pattern in patterns:
        if not any(_matches(path, pattern) for path in paths):
            raise ValueError(
                f"select={pattern!r} matched no parameters; there are: {listing(paths)}"
            )
    return tuple(path for path in paths if any(_matches(path, p) for p in patterns))


def _matches(path: str, pattern: str) -> bool:
    return matching_prefix(path, pattern) is not None


def matching_prefix(path: str, pattern: str) -> str | None:
    """The path, or the largest subtree that it lies in, that matches the pattern; None if none."""
    keys = path.split("/")
    prefixes = ("/".join(keys[:depth]) for depth in range(1, len(keys) + 1))
    return next((p for p in prefixes if fnmatch.fnmatchcase(p, pattern.strip("/"))), None)


def listing(paths: Sequence[str]) -> str:
    """All paths if they are few, otherwise the subtrees at the root and the first few leaves."""
    if len(paths) <= _LISTED:
        return ", ".join(paths)
    roots = list(dict.fromkeys(path.split("/")[0] for path in paths))
    shown = ", ".join(f"{root}/*" for root in roots[:_LISTED])
    more = ", ..." if len(roots) > _LISTED else ""
    return f"{shown}{more} ({len(paths)} leaves, the first {', '.join(paths[:3])})"
