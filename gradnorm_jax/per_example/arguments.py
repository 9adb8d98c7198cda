"""Arguments that all functions of per-example gradients take: as they are needed, and checked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike


def as_partial(function: Callable[..., Any]) -> Partial:
    """`function` as a pytree whose leaves are the arrays bound to it."""
    return function if isinstance(function, Partial) else Partial(function)


def check_batch(
    batch: Any, mask: ArrayLike | None = None, microbatch_size: int | None = None
) -> jax.Array | None:
    """The mask as an array; ValueError unless it, the batch and its microbatches go together."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "all leaves of the batch must have one first axis of at least one example; "
            f"got first axes {sorted(sizes)}"
        )
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(f"microbatch_size must be at least 1, got {microbatch_size}")
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.shape not in sizes or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool, true for examples and false for padding, of shape {sizes.pop()}, "
            f"got {mask.dtype}{list(mask.shape)}"
        )
    return mask
