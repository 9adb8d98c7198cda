"""Parameters by path: which leaves of a parameter tree a selection names."""

import fnmatch
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gradnorm_jax.types import Params

Select = None | str | Sequence[str] | Callable[[str], bool]
"""All leaves (None), those under any of some path patterns, or those whose path is approved."""

_LISTED = 12


def leaves_by_path(params: Params) -> dict[str, jax.Array]:
    """The leaves of a tree by their path, the keys on the way joined by '/'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(
            "two parameters have the same path when their keys are joined by '/': "
            f"{_listing(tuple(named))}; rename the key with a '/' in it"
        )
    return named


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
    leaves = leaves_by_path(params)
    if not leaves:
        raise ValueError("params has no leaves; give the parameters that loss_fn takes")
    selected = _choose(tuple(leaves), select)
    for path in selected:
        dtype = jnp.result_type(leaves[path])
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"the parameter {path} has no gradient, as {dtype} is no type of real numbers; "
                "leave it out (select)"
            )
    return selected


def _choose(paths: tuple[str, ...], select: Select) -> tuple[str, ...]:
    if select is None:
        return paths
    if callable(select):
        chosen = {path for path in paths if select(path)}
        if not chosen:
            raise ValueError(f"select approves of no parameter; there are: {_listing(paths)}")
        return tuple(path for path in paths if path in chosen)
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        if not any(_matches(path, pattern) for path in paths):
            raise ValueError(
                f"select={pattern!r} matches no parameter; there are: {_listing(paths)}"
            )
    return tuple(path for path in paths if any(_matches(path, p) for p in patterns))


def _matches(path: str, pattern: str) -> bool:
    """Whether the pattern matches the path or one of the subtrees that it lies in."""
    keys = path.split("/")
    pattern = pattern.strip("/")
    return any(
        fnmatch.fnmatchcase("/".join(keys[:depth]), pattern) for depth in range(1, len(keys) + 1)
    )


def _listing(paths: Sequence[str]) -> str:
    """All paths if they are few, otherwise the subtrees at the root and the first few leaves."""
    if len(paths) <= _LISTED:
        return ", ".join(paths)
    roots = list(dict.fromkeys(path.split("/")[0] for path in paths))
    shown = ", ".join(f"{root}/*" for root in roots[:_LISTED])
    more = ", ..." if len(roots) > _LISTED else ""
    return f"{shown}{more} ({len(paths)} leaves, the first {', '.join(paths[:3])})"
