"""Models from Flax NNX modules."""

import functools
from typing import Any

import jax
from flax import nnx

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

_ATTRIBUTE = "gradnorm_jax_calls"


def from_nnx(
    module: nnx.Module,
    example: Example,
    *,
    head: str | Path | None = None,
    **call_kwargs: Any,
) -> Model:
    """The `Model` of an NNX classifier that yields logits `[B, C]`; it is left as it is.

    The model is a copy in evaluation mode: dropout is off and batch normalisation uses its running
    averages. The features are what the last layer, a Linear or a 1x1 convolution, is given. That
    layer is the one whose output is what the module yields, or the only one from `[B, D]` to
    `[B, C]`.

    Example:
        >>> model = from_nnx(network, images[:2])
        >>> features, logits = model(images)

    Args:
        module: the classifier.
        example: images `[B, ...]`. An array is also run once, to check that the logits are
            `features @ kernel + bias`; of a `jax.ShapeDtypeStruct` only shapes are checked.
        head: path of the last layer, "a/b/head" or its parts; found if None.
        **call_kwargs: for the call of the module; hashable.

    Returns:
        The model; its `params` are the values of all `nnx.Param`, nested as the module is.

    Raises:
        ValueError: the last layer is not found, or is not the only candidate, all of which are
            listed; something follows it.
    """
    watched = nnx.clone(module)
    watched.eval()
    for _, layer in nnx.iter_modules(watched):
        if isinstance(getattr(layer, "kernel", None), nnx.Param):
            layer.__class__ = _watched(type(layer))
    params, others = map(nnx.to_pure_dict, nnx.state(watched, nnx.Param, ...))
    call = static_call(nnx.graphdef(watched), call_kwargs)
    return model_from_calls(jax.tree_util.Partial(_record, call, others), params, example, head)


def _record(
    call: Static, others: dict[str, Any], params: Params, images: jax.Array
) -> tuple[Any, Calls]:
    graph, arguments = call.value
    module = nnx.merge(graph, params, others)
    result = module(images, **dict(arguments))
    calls: dict[Any, Any] = {
        path: getattr(layer, _ATTRIBUTE).get_value()
        for path, layer in nnx.iter_modules(module)
        if hasattr(layer, _ATTRIBUTE)
    }
    return result, calls


# One type for each type of layer, or equal modules would not have equal graphs.
@functools.cache
def _watched(layer_type: type[nnx.Module]) -> type[nnx.Module]:
    """`layer_type`, but a layer notes its calls in a variable of its own."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = layer_type.__call__(self, *args, **kwargs)
        noted = Call((*args, *kwargs.values())[0], outputs)
        if could_be_last(self.kernel, noted):
            # A variable leaves nnx.jit and nnx.remat as it should; a reference would leak.
            earlier = getattr(self, _ATTRIBUTE).get_value() if hasattr(self, _ATTRIBUTE) else ()
            setattr(self, _ATTRIBUTE, nnx.Intermediate((*earlier, noted)))
        return outputs

    return type(layer_type.__name__, (layer_type,), {"__call__": call})
