"""The strict conversion of weights by their keys to and from parameter trees."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gradnorm_jax.tree import Params, Path, non_finite
from gradnorm_jax.weights.stored import Checkpoint

_LISTED = 5


@dataclasses.dataclass(frozen=True)
class CheckpointEntry:
    """Where a checkpoint holds a parameter.

    Attributes:
        key: the array's name.
        axes: the permutation that turns the checkpoint's array into the parameter, in the
            convention of `numpy.transpose`; None if they are laid out alike.
        shape: what the array has after that, where the parameter has its entries in the same order
            but another shape.
        part: (i, n) if the array holds n parameters one after the other along its first axis, and
            this is number i from 0.
    """

    key: str
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None


Layout = Callable[[Path], CheckpointEntry]
"""Tells for every parameter, and every batch statistic, of an architecture where its checkpoints
hold it: all of them, and nothing twice."""


def to_params(checkpoint: Checkpoint, template: Params, layout: Layout) -> Params:
    """The parameter tree that a checkpoint holds: every key used, every parameter filled.

    Args:
        checkpoint: arrays by key.
        template: nested dictionaries of arrays or `jax.ShapeDtypeStruct`, of the shapes and types
            wanted.
        layout: where each parameter is.

    Returns:
        A tree like `template` of NumPy arrays.

    Raises:
        ValueError: keys are missing or unexpected, or arrays are of the wrong shape or no
            floating-point numbers; one message names them all.
    """
    check_layout(checkpoint, template, layout)
    params = {}
    for path, leaf in traverse_util.flatten_dict(template).items():
        entry = layout(path)
        array = checkpoint[entry.key]
        if entry.part is not None:
            index, count = entry.part
            array = np.split(array, count)[index]
        array = _permute(array, entry.axes).reshape(leaf.shape)
        params[path] = array.astype(leaf.dtype, copy=False)
    return traverse_util.unflatten_dict(params)


def from_params(params: Params, layout: Layout) -> dict[str, jax.Array]:
    """The inverse of `to_params`: the arrays of a parameter tree under the checkpoint's keys."""
    parts: dict[str, dict[int, Any]] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        entry = layout(path)
        array = leaf if entry.shape is None else leaf.reshape(entry.shape)
        inverse = None if entry.axes is None else tuple(map(entry.axes.index, range(array.ndim)))
        index = 0 if entry.part is None else entry.part[0]
        parts.setdefault(entry.key, {})[index] = _permute(array, inverse)
    return {
        key: arrays[0] if len(arrays) == 1 else jnp.concatenate([arrays[i] for i in sorted(arrays)])
        for key, arrays in parts.items()
    }


def to_variables(
    checkpoint: Checkpoint, template: Mapping[str, Params], layout: Layout
) -> dict[str, Params]:
    """`to_params` for several collections: parameters and batch statistics, say."""
    arrays = traverse_util.flatten_dict(to_params(checkpoint, merge(template), layout))
    return {
        collection: traverse_util.unflatten_dict(
            {path: arrays[path] for path in traverse_util.flatten_dict(tree)}
        )
        for collection, tree in template.items()
    }


def merge(variables: Mapping[str, Params]) -> Params:
    """One tree of what several collections hold, none of which has a path of another."""
    leaves: dict[Path, Any] = {}
    for tree in variables.values():
        leaves |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(leaves)


def check_layout(checkpoint: Mapping[str, Any], template: Params, layout: Layout) -> None:
    """Raises ValueError unless `to_params` can convert arrays of these shapes and types."""
    expected = jax.eval_shape(functools.partial(from_params, layout=layout), template)
    check_checkpoint(checkpoint, {key: leaf.shape for key, leaf in expected.items()})


def check_finite(checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError that names the arrays in which a number is not finite."""
    if bad := non_finite(checkpoint):
        raise ValueError(
            f"the checkpoint holds numbers that are not finite, {_listing('arrays', bad)}: it is "
            "damaged, or training has diverged; take another one"
        )


def check_checkpoint(
    checkpoint: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError unless the checkpoint has exactly the keys and shapes expected.

    Args:
        checkpoint: arrays, or their shapes and types, by key.
        expected: shapes by key.
    """
    missing = sorted(expected.keys() - checkpoint.keys())
    unexpected = sorted(checkpoint.keys() - expected.keys())
    differing = [
        f"{key} is {array.dtype}{list(array.shape)} in place of float{list(expected[key])}"
        for key, array in sorted(checkpoint.items())
        if key in expected
        and not (array.shape == expected[key] and jnp.issubdtype(array.dtype, jnp.floating))
    ]
    if missing or unexpected or differing:
        raise ValueError(
            "the checkpoint does not fit, most likely because it is of another architecture: "
            f"{_listing('missing', missing)}; {_listing('unexpected', unexpected)}; "
            f"{_listing('of another shape or type', differing)}"
        )


def _listing(title: str, names: list[str]) -> str:
    listed = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {title}" + (f" ({listed}{more})" if names else "")


def _permute(array: Any, axes: tuple[int, ...] | None) -> Any:
    return array if axes is None else array.transpose(axes)
