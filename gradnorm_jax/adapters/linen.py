"""Models from Flax Linen modules."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze

from gradnorm_jax.adapters.arguments import join_arguments, split_arguments
from gradnorm_jax.adapters.build import Example, PickLogits, build_model
from gradnorm_jax.adapters.keys import Static, static
from gradnorm_jax.tree import Path
from gradnorm_jax.types import Model, Variables

_HOW = '{"params": state.params, "batch_stats": state.batch_stats}'


def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: Example,
    *,
    logits: PickLogits | None = None,
    head: str | Path | None = None,
    find_head: bool = True,
    **call_kwargs: Any,
) -> Model:
    """The `Model` of a Linen classifier; it needs no edit.

    The last layer is found in the program of `module.apply`: the matrix product, or 1x1
    convolution, of a parameter with something that depends on the images, after which nothing comes
    but a bias, casts and changes of shape. Its input are the features.

    Example:
        >>> model = from_linen(network, variables, images[:2], train=False)
        >>> features, logits = model(images)

    Args:
        module: the classifier. It may return logits `[B, C]`, or a tuple, dictionary or dataclass
            of which one entry `[B, C]` ends in a linear layer.
        variables: its variables; of a training state,
            `{"params": state.params, "batch_stats": state.batch_stats}`.
        images: example images `[B, ...]`. Arrays are also run once, to check that the logits are
            `features @ kernel + bias`; of a `jax.ShapeDtypeStruct` only the program is looked at.
        logits: picks the logits from what the module returns, such as `lambda out: out.logits`.
        head: path of the last layer, "a/b/head" or its parts, to choose among several.
        find_head: False for a model without features, whose last layer may be anything.
        **call_kwargs: for `module.apply`, such as `train=False`, `method=...` or `rngs=...`.

    Returns:
        The model; its `params` are `variables["params"]`, without partitioning metadata, and its
        `state` the other collections. Modules that are built alike make models that are compiled
        once, whether or not they can be hashed.

    Raises:
        ValueError: there are no "params" among the variables; the logits do not end in a linear
            layer, or several entries do. The message says what was met on the way, and the cure.
    """
    collections = _collections(variables)
    params = collections.pop("params")
    function = jax.tree_util.Partial(_apply, static(module), *split_arguments(call_kwargs))
    return build_model(
        function,
        Variables(params, collections),
        images,
        logits=logits,
        head=head,
        find_head=find_head,
    )


def _collections(variables: Any) -> dict[str, Any]:
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"variables must be a mapping of collections, got {type(variables).__name__}; of a "
            f"training state give {_HOW}"
        )
    if "params" not in variables:
        raise ValueError(
            f'variables must hold "params", got only {sorted(variables)}; parameters are given as '
            f'{{"params": params}}, and with batch statistics as {_HOW}'
        )
    return dict(unfreeze(nn.unbox(dict(variables))))


def _apply(
    module: Static, rest: Static, arrays: list[Any], variables: Variables, images: jax.Array
) -> Any:
    collections = {**variables.state, "params": variables.params}
    return module.value.apply(collections, images, **join_arguments(rest, arrays))
