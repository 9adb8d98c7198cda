"""The entries of what a model returns, and which of them holds the logits."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax.adapters.frames import Frame, Ref, inputs_of
from gradnorm_jax.adapters.head import Layer, Trace, find_layer, skip_moves
from gradnorm_jax.adapters.refusals import NoHeadError
from gradnorm_jax.jaxprs import body
from gradnorm_jax.tree import Path, leaves_by_path, show_path
from gradnorm_jax.types import Variables

_SAY_WHICH = "say which one holds the logits with logits=lambda output: ..."


def matrices(output: Any, rows: int) -> dict[Path, jax.Array]:
    """The entries of a model's output that could be its logits, by path, as `[rows, C]`.

    Raises:
        NoHeadError: there are none.
    """
    leaves = leaves_by_path(_as_pytree(output))
    found = {
        path: leaf.reshape(rows, leaf.shape[-1])
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and _is_matrix(leaf, rows)
    }
    if not found:
        listed = ", ".join(f"{_show(path)} {_describe(leaf)}" for path, leaf in leaves.items())
        raise NoHeadError(
            f"the logits must be an array [{rows}, C], one row for each of the {rows} images, but "
            f"the model returns {listed or 'nothing'}"
        )
    return found


def trace_entries(
    entries_of: Callable[..., Mapping[Path, jax.Array]],
    function: jax.tree_util.Partial,
    variables: Variables,
    images: Any,
) -> tuple[Trace, dict[Path, Ref]]:
    """The program of `entries_of(function, variables, images)`, and the values of its results."""
    paths: list[Path] = []

    def entries(*arguments: Any) -> list[jax.Array]:
        found = entries_of(*arguments)
        paths.extend(found)
        return list(found.values())

    program = jax.make_jaxpr(entries)(function, variables, images)
    frame = Frame(program)
    inputs = [Ref(frame, variable) for variable in body(program).invars]
    first = len(jax.tree.leaves(function))
    params = dict(zip(inputs[first:], leaves_by_path(variables.params), strict=False))
    data = frozenset(inputs[len(inputs) - len(jax.tree.leaves(images)) :])
    results = [Ref(frame, atom) for atom in body(program).outvars]
    return Trace(frame, params, data), dict(zip(paths, results, strict=True))


def distinct(entries: Mapping[Path, Ref]) -> dict[Path, Ref]:
    """The entries without those that hold what an earlier one holds."""
    first: dict[Ref, Path] = {}
    for path, ref in entries.items():
        first.setdefault(skip_moves(ref), path)
    return {path: entries[path] for path in first.values()}


def only_entry(entries: Mapping[Path, Ref]) -> Path:
    """The path of the one entry; NoHeadError if there are several."""
    paths = list(distinct(entries))
    if len(paths) > 1:
        listed = ", ".join(f"{_show(path)} {list(entries[path].shape)}" for path in paths)
        raise NoHeadError(f"the model returns {len(paths)} matrices: {listed}; {_SAY_WHICH}")
    return paths[0]


def choose_entry(trace: Trace, entries: Mapping[Path, Ref], head: str | None) -> tuple[Path, Layer]:
    """The one entry that ends in a last layer, and that layer.

    An entry that leads, through other parameters, to a second one holds features, not logits.

    Args:
        trace: the program.
        entries: candidates for the logits, by path.
        head: path of the last layer or of its kernel; None for any.

    Raises:
        NoHeadError: no entry does, or several do; says why, of each of them.
    """
    entries = distinct(entries)
    layers: dict[Path, Layer] = {}
    refused: dict[Path, str] = {}
    for path, ref in entries.items():
        try:
            layer = find_layer(trace, ref, *ref.shape)
        except NoHeadError as error:
            refused[path] = str(error)
            continue
        if _leads_on(trace, ref, entries.values()):
            refused[path] = "another entry is computed from it, with parameters"
        else:
            layers[path] = layer
    if not layers:
        raise NoHeadError(_why_none(entries, refused))
    return _named(layers, head)


def _named(layers: Mapping[Path, Layer], head: str | None) -> tuple[Path, Layer]:
    kernels = {path: layer.head.kernel for path, layer in layers.items()}
    chosen = [
        path
        for path, kernel in kernels.items()
        if head is None or head.strip("/") in (show_path(kernel), show_path(kernel[:-1]))
    ]
    if len(chosen) == 1:
        return chosen[0], layers[chosen[0]]
    listed = ", ".join(f"{_show(path)} in {show_path(kernels[path])}" for path in layers)
    if not chosen:
        raise NoHeadError(f"no entry of the output ends in a layer {head!r}; they end: {listed}")
    raise NoHeadError(
        f"{len(chosen)} entries of what the model returns end in a last layer: {listed}; "
        f"{_SAY_WHICH} or name the layer with head="
    )


def _leads_on(trace: Trace, entry: Ref, others: Any) -> bool:
    """Whether another entry is computed from this one, with the help of parameters."""
    value = skip_moves(entry)
    for other in others:
        met = inputs_of(other, but=[value])
        if value in met and skip_moves(other) != value and not met.isdisjoint(trace.params):
            return True
    return False


def _why_none(entries: Mapping[Path, Ref], refused: Mapping[Path, str]) -> str:
    if len(refused) == 1:
        return next(iter(refused.values()))
    each = "; ".join(
        f"{_show(path)} {list(entries[path].shape)}: {why}" for path, why in refused.items()
    )
    return f"no entry of what the model returns ends in a linear last layer. {each}"


def _as_pytree(output: Any) -> Any:
    """The output with dataclasses that are no pytrees as dictionaries of their fields."""

    def convert(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf):
            return leaf
        names = [field.name for field in dataclasses.fields(leaf)]
        return {name: _as_pytree(getattr(leaf, name)) for name in names}

    return jax.tree.map(convert, output)


def _is_matrix(array: jax.Array, rows: int) -> bool:
    shape = array.shape
    between = all(length == 1 for length in shape[1:-1])
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return len(shape) >= 2 and shape[0] == rows and between and floating


def _describe(leaf: Any) -> str:
    return str(list(leaf.shape)) if hasattr(leaf, "shape") else type(leaf).__name__


def _show(path: Path) -> str:
    return f"output/{show_path(path)}" if path else "the output"
