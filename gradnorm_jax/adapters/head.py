"""Finding a classifier's last layer and checking that it is one; shared by all adapters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.types import Head, Model, Outputs, Params, Path, get_path, head_parameters

Example = jax.typing.ArrayLike | jax.ShapeDtypeStruct
"""Images `[B, ...]`, or only their shape and type."""

_NOT_WATCHED = (
    " (a layer that is applied before pooling, under a scan, or more than once is not among them:"
    " use from_apply)"
)


class Call(NamedTuple):
    """One call of a layer: what it was given and what it gave."""

    inputs: jax.Array
    outputs: jax.Array


Calls = Mapping[Path, Sequence[Call]]
"""The calls of the layers that may be the last one, by the layers' paths in the parameters."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value that rides in a pytree without being a leaf of it."""

    value: Any


def static_call(module: Any, arguments: Mapping[str, Any]) -> Static:
    """A module and the named arguments of its call; ValueError unless they are hashable."""
    call = Static((module, tuple(sorted(arguments.items()))))
    try:
        hash(call)
    except TypeError as error:
        raise ValueError(
            f"the module and the arguments {sorted(arguments)} of its call must be hashable, but "
            f"there is an {error}: use from_apply with a function that holds it"
        ) from None
    return call


def as_matrix(name: str, array: Any) -> jax.Array:
    """`[B, ..., K]` as `[B, K]`; ValueError unless all axes between have length one."""
    if not isinstance(array, jax.Array) or not _is_matrix(array.shape):
        found = getattr(array, "shape", type(array).__name__)
        raise ValueError(f"{name} must be an array [B, ...], one row per image, got {found}")
    return array.reshape(array.shape[0], array.shape[-1])


def could_be_last(kernel: Any, call: Call) -> bool:
    """Whether a layer with this kernel led from features `[B, D]` to `[B, C]` in this call."""
    shapes: list[tuple[int, ...]] = [getattr(array, "shape", ()) for array in call]
    return all(map(_is_matrix, shapes)) and is_kernel(kernel.shape, *(s[-1] for s in shapes))


def is_kernel(shape: tuple[int, ...], D: int, C: int) -> bool:
    """Whether a parameter of this shape can be the kernel of a layer from `[B, D]` to `[B, C]`."""
    return shape in ((D, C), (1, 1, D, C))


def choose_kernel(
    kernels: Mapping[Path, tuple[int, ...]],
    head: str | Path | None,
    classes: int,
    *,
    note: str = "",
) -> Path:
    """The only kernel, or the one that is `head` or lies right under it; ValueError otherwise.

    Args:
        kernels: shapes of the kernels that could be the last layer's, by path.
        head: path of a layer or of its kernel; None for any.
        classes: C, for the error.
        note: what the error says at its end.
    """
    name = head if head is None or isinstance(head, str) else _show(head)
    chosen = [path for path in kernels if name in (None, _show(path), _show(path[:-1]))]
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(f"{_show(path)} {list(shape)}" for path, shape in kernels.items())
    raise ValueError(
        f"{len(chosen)} layers{'' if name is None else f' named {name!r}'} lead from features "
        f"[B, D] to logits [B, {classes}]: name one of these kernels with head=: "
        f"{listed or 'none'}{note}"
    )


def model_from_calls(
    record: jax.tree_util.Partial, params: Params, example: Example, head: str | Path | None
) -> Model:
    """The checked model of a classifier whose layers can be watched.

    Args:
        record: pure function `(params, images) -> (logits, Calls)`.
        params: its parameters; layers keep their kernels under the name "kernel".
        example: images to try it on.
        head: path of the last layer or of its kernel; None to find it.
    """

    def find(record: jax.tree_util.Partial, params: Params, images: jax.Array) -> Static:
        result, calls = record(params, images)
        classes = as_matrix("logits", result).shape[-1]
        called_once = {
            (*layer, "kernel"): call
            for layer, (call, *more) in calls.items()
            if not more and call.outputs.shape[-1] == classes
        }
        # The layer whose very output is the result is the last one, whatever the others' shapes.
        last = {path: call for path, call in called_once.items() if call.outputs is result}
        candidates = last if head is None and last else called_once
        shapes = {path: get_path(params, path).shape for path in candidates}
        return Static(choose_kernel(shapes, head, classes, note=_NOT_WATCHED))

    kernel = jax.eval_shape(find, record, params, example).value
    apply = jax.tree_util.Partial(_watch, Static(kernel[:-1]), record)
    return checked_model(apply, params, kernel, example)


def checked_model(
    apply: jax.tree_util.Partial, params: Params, kernel: Path, example: Example
) -> Model:
    """The model with its last layer's kernel at `kernel`, tried on `example` if that is an array.

    Raises:
        ValueError: several vectors beside the kernel could be the bias, or the logits of `example`
            are not `features @ kernel + bias`.
    """
    model = Model(apply, params, Head(kernel, _find_bias(params, kernel)))
    if isinstance(example, jax.ShapeDtypeStruct):
        return model
    difference, size, actual, expected = jax.device_get(_compare(model, example))
    # What is left by rounding to bfloat16, in which a float32 product may be computed.
    if not difference <= 2**-7 * size:
        raise ValueError(
            "the logits must be features @ kernel + bias of the last layer, but with the kernel "
            f"{_show(kernel)} they lie in [{actual[0]:.4g}, {actual[1]:.4g}] and that in "
            f"[{expected[0]:.4g}, {expected[1]:.4g}]: take out what follows the layer (a softmax, "
            "a scale, a mean), or name another layer with head="
        )
    return model


def _watch(
    layer: Static, record: jax.tree_util.Partial, params: Params, images: jax.Array
) -> Outputs:
    result, calls = record(params, jnp.asarray(images))
    (call,) = calls[layer.value]
    return Outputs(as_matrix("features", call.inputs), as_matrix("logits", result))


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


def _find_bias(params: Params, kernel: Path) -> Path | None:
    *layer, name = kernel
    siblings = get_path(params, tuple(layer))
    keys = siblings.keys() if isinstance(siblings, Mapping) else range(len(siblings))
    classes = siblings[name].shape[-1]
    vectors = [key for key in keys if getattr(siblings[key], "shape", None) == (classes,)]
    if "bias" in vectors:
        return (*layer, "bias")
    if len(vectors) > 1:
        raise ValueError(
            f"several vectors beside the kernel {_show(kernel)} could be its bias: {vectors}; "
            'call one of them "bias"'
        )
    return (*layer, *vectors) if vectors else None


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and all(length == 1 for length in shape[1:-1])


def _show(path: Path) -> str:
    return "/".join(map(str, path))
