"""Models from plain functions, and so from Equinox, Haiku, Keras or anything else in JAX."""

from collections.abc import Callable
from typing import Any

import jax

from gradnorm_jax.adapters.build import Example, PickLogits, build_model
from gradnorm_jax.adapters.keys import Static, static
from gradnorm_jax.tree import Params, Path
from gradnorm_jax.types import Model, Variables


def from_apply(
    function: Callable[[Params, jax.Array], Any],
    params: Params,
    images: Example,
    *,
    logits: PickLogits | None = None,
    head: str | Path | None = None,
    find_head: bool = True,
) -> Model:
    """The `Model` of a pure function of parameters and images.

    Its last layer is found in its program, as by `from_linen`.

    Example:
        >>> def function(params, images):
        ...     features = jnp.tanh(images @ params["body"])
        ...     return features @ params["head"]["kernel"]
        >>> model = from_apply(function, params, images[:2])

    Args:
        function: pure, `(params, images) -> logits [B, C]`, or a tuple such as `(features,
            logits)`, a dictionary or a dataclass of which one entry `[B, C]` ends in a linear
            layer. Arrays that are not parameters, batch statistics say, are best bound by
            `jax.tree_util.Partial`: in a closure they are constants.
        params: pytree of arrays.
        images: example images `[B, ...]`. Arrays are also run once, to check that the logits are
            `features @ kernel + bias`; of a `jax.ShapeDtypeStruct` only the program is looked at.
        logits: picks the logits from what the function returns, such as `lambda out: out[0]`.
        head: path of the last layer, "a/b/head" or its parts, to choose among several.
        find_head: False for a model without features, whose last layer may be anything.

    Returns:
        The model. Functions that are the same code over equal values make models that are compiled
        once.

    Raises:
        TypeError: a leaf of the parameters is no array.
        ValueError: the logits do not end in a linear layer, or several entries do. The message says
            what was met on the way, and the cure.
    """
    # A Partial stays one: wrapped, it would hide its arrays from transformations.
    is_partial = isinstance(function, jax.tree_util.Partial)
    inner = function if is_partial else jax.tree_util.Partial(_call, static(function))
    return build_model(
        jax.tree_util.Partial(_apply, inner),
        Variables(params),
        images,
        logits=logits,
        head=head,
        find_head=find_head,
    )


def _call(function: Static, params: Params, images: jax.Array) -> Any:
    return function.value(params, images)


def _apply(function: jax.tree_util.Partial, variables: Variables, images: jax.Array) -> Any:
    return function(variables.params, images)
