"""Models from Flax Linen modules."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from gradnorm_jax.adapters.head import (
    Call,
    Calls,
    Example,
    Static,
    could_be_last,
    model_from_calls,
    static_call,
)
from gradnorm_jax.types import Model, Params, Path

_COLLECTION = "gradnorm_jax"


def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    example: Example,
    *,
    head: str | Path | None = None,
    **call_kwargs: Any,
) -> Model:
    """The `Model` of a Linen classifier that yields logits `[B, C]`; it needs no edit.

    The features are what the last layer, a Dense or a 1x1 convolution, is given. That layer is the
    one whose output is what the module yields, or the only one from `[B, D]` to `[B, C]`.

    Example:
        >>> model = from_linen(network, variables, images[:2], train=False)
        >>> features, logits = model(images)

    Args:
        module: the classifier.
        variables: its variables; collections beside "params", batch statistics say, are frozen.
        example: images `[B, ...]`. An array is also run once, to check that the logits are
            `features @ kernel + bias`; of a `jax.ShapeDtypeStruct` only shapes are checked.
        head: path of the last layer, "a/b/head" or its parts; found if None.
        **call_kwargs: for `module.apply`, such as `train=False` or `method=...`; hashable.

    Returns:
        The model; its `params` are `variables["params"]`, without partitioning metadata.

    Raises:
        ValueError: there are no parameters; the last layer is not found, or is not the only
            candidate, all of which are listed; something follows it.
    """
    variables = unfreeze(nn.unbox(variables))
    if "params" not in variables:
        raise ValueError(f'variables must hold "params", got only {sorted(variables)}')
    params = variables.pop("params")
    call = static_call(module, call_kwargs)
    return model_from_calls(jax.tree_util.Partial(_record, call, variables), params, example, head)


def _record(
    call: Static, collections: dict[str, Any], params: Params, images: jax.Array
) -> tuple[Any, Calls]:
    module, arguments = call.value
    with nn.intercept_methods(_sow_call):
        result, sown = module.apply(
            {**collections, "params": params}, images, mutable=[_COLLECTION], **dict(arguments)
        )
    # Always every layer, not only the last: nn.jit may keep what an earlier trace has sown.
    return result, {
        path[:-1]: calls for path, calls in flatten_dict(sown.get(_COLLECTION, {})).items()
    }


def _sow_call(
    layer: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    outputs = layer(*args, **kwargs)
    module = context.module
    if context.method_name == "__call__" and module.has_variable("params", "kernel"):
        call = Call((*args, *kwargs.values())[0], outputs)
        if could_be_last(module.get_variable("params", "kernel"), call):
            # Sown, the arrays leave nn.jit and nn.remat as they should; a reference would leak.
            module.sow(_COLLECTION, "call", call)
    return outputs
