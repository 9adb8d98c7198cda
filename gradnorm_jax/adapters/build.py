"""A `Model` from a pure function of variables and images, whatever framework it comes from."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from gradnorm_jax.adapters.entries import choose_entry, matrices, only_entry, trace_entries
from gradnorm_jax.adapters.evaluate import logits_and_features
from gradnorm_jax.adapters.head import find_layer
from gradnorm_jax.adapters.keys import Static, static
from gradnorm_jax.convolution import lower_convolutions
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.tree import Path, show_path
from gradnorm_jax.types import Head, Model, Outputs, Variables, head_parameters

Example = jax.typing.ArrayLike | jax.ShapeDtypeStruct
"""Images `[B, ...]`, or only their shape and type."""

_NO_FEATURES = cast(jax.Array, None)
"""The features of a model without a last layer; all who need them need a `Model.head`."""

PickLogits = Callable[[Any], Any]
"""From what a model returns to its logits `[B, C]`."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Location:
    """Where in a model's output the logits are, and in its parameters the last layer."""

    entry: Path
    head: Head | None


def build_model(
    function: jax.tree_util.Partial,
    variables: Variables,
    images: Example,
    *,
    logits: PickLogits | None,
    head: str | Path | None,
    find_head: bool,
) -> Model:
    """The model of `function(variables, images)`, which may return more than logits.

    Args:
        function: pure; its arrays are its leaves.
        variables: of the classifier.
        images: to trace it with and, if they are an array, to check it on.
        logits: picks the logits from what the function returns; None to find them.
        head: path of the last layer, or of its kernel; None for any.
        find_head: whether to look for a last layer at all.

    Raises:
        TypeError: a leaf of the parameters is no array.
        ValueError: there is no last layer, or several; or the logits of `images` are not
            `features @ kernel + bias`.
    """
    _check_arrays(variables.params)
    name = head if head is None or isinstance(head, str) else show_path(tuple(head))
    picked = function if logits is None else jax.tree_util.Partial(_pick, static(logits), function)
    if not isinstance(images, jax.ShapeDtypeStruct):
        images = jnp.asarray(images)
    # Located under jit, the program is traced once for all models that are built alike.
    options = Static((name, find_head), (name, find_head))
    location = jax.eval_shape(_locate, options, picked, variables, images)
    model = Model(jax.tree_util.Partial(_outputs, location, picked), variables, location.head)
    if not isinstance(images, jax.ShapeDtypeStruct) and _is_known((picked, variables, images)):
        _check_outputs(model, images)
    return model


@jax.jit
def _locate(
    options: Static, function: jax.tree_util.Partial, variables: Variables, images: jax.Array
) -> _Location:
    name, find_head = options.value
    trace, entries = trace_entries(_all_entries, function, variables, images)
    if not find_head:
        return _Location(only_entry(entries), None)
    path, layer = choose_entry(trace, entries, name)
    return _Location(path, layer.head)


@jax.jit
def _outputs(
    location: _Location,
    function: jax.tree_util.Partial,
    variables: Variables,
    images: jax.Array,
) -> Outputs:
    def entry(*arguments: Any) -> dict[Path, jax.Array]:
        return {location.entry: _all_entries(*arguments)[location.entry]}

    if location.head is None:
        return Outputs(
            _NO_FEATURES, lower_convolutions(entry)(function, variables, images)[location.entry]
        )
    # Anew for each shape of images: the program of eight images is not that of one.
    trace, entries = trace_entries(entry, function, variables, images)
    ref = entries[location.entry]
    layer = find_layer(trace, ref, *ref.shape)
    if layer.head != location.head:
        raise ValueError(
            f"for images {list(images.shape)} the last layer is {layer.head}, but for the example "
            f"images it was {location.head}: give example images of the shape to be used"
        )
    operands = jax.tree.leaves((function, variables, images))
    logits, features = logits_and_features(trace.frame.program, layer, operands)
    return Outputs(features, logits)


def _all_entries(
    function: jax.tree_util.Partial, variables: Variables, images: jax.Array
) -> dict[Path, jax.Array]:
    return matrices(function(variables, images), images.shape[0])


def _pick(
    logits: Static, function: jax.tree_util.Partial, variables: Variables, images: jax.Array
) -> Any:
    return logits.value(function(variables, images))


def _check_arrays(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "shape") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"the parameters must be arrays, but there is {leaf!r} at "
                f"{jax.tree_util.keystr(path)}: split it off (params, rest = eqx.partition(module, "
                "eqx.is_array), in Equinox) and put it back in the function"
            )


def _is_known(tree: Any) -> bool:
    """Whether all leaves have values: none is traced, and none is only a shape."""
    return not any(
        isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)
    )


def _check_outputs(model: Model, images: jax.Array) -> None:
    head = model.head
    if head is None:
        return
    compared = _compare(model, images)
    if not _is_known(compared):  # all is a constant of a function that is being traced
        return
    difference, size, actual, expected = jax.device_get(compared)
    # What is left by rounding to bfloat16, in which a float32 product may be computed.
    if not difference <= 2**-7 * size:
        raise ValueError(
            "the logits must be features @ kernel + bias of the last layer, but with the kernel "
            f"{show_path(head.kernel)} they lie in [{actual[0]:.4g}, {actual[1]:.4g}] and that in "
            f"[{expected[0]:.4g}, {expected[1]:.4g}]: are there infinite numbers or NaN in the "
            "variables or the images?"
        )


@jax.jit
def _compare(model: Model, images: jax.Array) -> tuple[jax.Array, ...]:
    """Root mean square of logits - (features @ kernel + bias) and of the terms; both ranges."""
    features, logits = map(to_float32_at_least, model(images))
    kernel, bias = head_parameters(model)
    features, kernel = features.astype(logits.dtype), kernel.astype(logits.dtype)
    bias = jnp.zeros((), logits.dtype) if bias is None else bias.astype(logits.dtype)
    bias = jnp.broadcast_to(bias, logits.shape)
    expected = jnp.matmul(features, kernel, precision="highest") + bias
    # Rounding errors of a sum grow with the root of the sum of its terms' squares.
    squares = features**2 @ kernel**2 + bias**2 + logits**2
    return (
        jnp.sqrt(jnp.mean((logits - expected) ** 2)),
        jnp.sqrt(jnp.mean(squares)),
        jnp.stack([logits.min(), logits.max()]),
        jnp.stack([expected.min(), expected.max()]),
    )
