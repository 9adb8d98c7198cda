"""Models from plain functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax.adapters.head import Example, as_matrix, checked_model, choose_kernel, is_kernel
from gradnorm_jax.types import Model, Outputs, Params, Path, leaf_path


def from_apply(
    function: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]],
    params: Params,
    example: Example,
    *,
    head: str | Path | None = None,
) -> Model:
    """The `Model` of a pure function that yields features and logits.

    The last layer's kernel is the only parameter of shape `[D, C]` or `[1, 1, D, C]`, its bias the
    vector `[C]` beside it, if there is one.

    Example:
        >>> def function(params, images):
        ...     features = jnp.tanh(images @ params["body"])
        ...     return features, features @ params["head"]["kernel"]
        >>> model = from_apply(function, params, images[:2])

    Args:
        function: pure, `(params, images) -> (features [B, D], logits [B, C])`. Arrays that are not
            parameters may ride in a `jax.tree_util.Partial`.
        params: nested mappings and sequences of arrays.
        example: images `[B, ...]`. An array is also run once, to check that the logits are
            `features @ kernel + bias`; of a `jax.ShapeDtypeStruct` only shapes are checked.
        head: path of the last layer or of its kernel, "a/b/head" or its parts; found if None.

    Returns:
        The model.

    Raises:
        ValueError: the function yields something else; the kernel or the bias is not found, or is
            not the only candidate, all of which are listed; the logits are something else.
    """
    # A Partial stays one: wrapped, it would hide its arrays from transformations.
    is_partial = isinstance(function, jax.tree_util.Partial)
    inner = function if is_partial else jax.tree_util.Partial(function)
    apply = jax.tree_util.Partial(_outputs, inner)
    features, logits = jax.eval_shape(apply, params, example)
    D, C = features.shape[-1], logits.shape[-1]
    kernels = {
        leaf_path(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if is_kernel(leaf.shape, D, C)
    }
    return checked_model(apply, params, choose_kernel(kernels, head, C), example)


def _outputs(function: jax.tree_util.Partial, params: Params, images: jax.Array) -> Outputs:
    result: Any = function(params, jnp.asarray(images))
    if not isinstance(result, tuple) or len(result) != 2:
        found = f"tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(f"function must return (features, logits), got {found}")
    features, logits = result
    return Outputs(as_matrix("features", features), as_matrix("logits", logits))
