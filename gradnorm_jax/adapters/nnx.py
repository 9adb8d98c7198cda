"""Models from Flax NNX modules."""

from typing import Any

import jax
from flax import nnx

from gradnorm_jax.adapters.arguments import join_arguments, split_arguments
from gradnorm_jax.adapters.build import Example, PickLogits, build_model
from gradnorm_jax.adapters.keys import Static, static
from gradnorm_jax.tree import Path
from gradnorm_jax.types import Model, Variables


def from_nnx(
    module: nnx.Module,
    images: Example,
    *,
    logits: PickLogits | None = None,
    head: str | Path | None = None,
    find_head: bool = True,
    **call_kwargs: Any,
) -> Model:
    """The `Model` of an NNX classifier, which is left as it is.

    The model is a copy in evaluation mode: dropout is off and batch normalisation uses its running
    averages. Its last layer is found in its program, as by `from_linen`.

    Example:
        >>> model = from_nnx(network, images[:2])
        >>> features, logits = model(images)

    Args:
        module: the classifier. It may return logits `[B, C]`, or a tuple, dictionary or dataclass
            of which one entry `[B, C]` ends in a linear layer.
        images: example images `[B, ...]`. Arrays are also run once, to check that the logits are
            `features @ kernel + bias`; of a `jax.ShapeDtypeStruct` only the program is looked at.
        logits: picks the logits from what the module returns, such as `lambda out: out.logits`.
        head: path of the last layer, "a/b/head" or its parts, to choose among several.
        find_head: False for a model without features, whose last layer may be anything.
        **call_kwargs: for the call of the module.

    Returns:
        The model; its `params` are the values of all `nnx.Param`, nested as the module is, and its
        `state` all other arrays. Modules that are built alike make models that are compiled once.

    Raises:
        ValueError: the logits do not end in a linear layer, or several entries do. The message says
            what was met on the way, and the cure.
    """
    copy = nnx.clone(module)
    copy.eval()
    params, state = map(nnx.to_pure_dict, nnx.state(copy, nnx.Param, ...))
    graph = static(nnx.graphdef(copy))
    function = jax.tree_util.Partial(_call, graph, *split_arguments(call_kwargs))
    return build_model(
        function, Variables(params, state), images, logits=logits, head=head, find_head=find_head
    )


def _call(
    graph: Static, rest: Static, arrays: list[Any], variables: Variables, images: jax.Array
) -> Any:
    module = nnx.merge(graph.value, *variables)
    return module(images, **join_arguments(rest, arrays))
