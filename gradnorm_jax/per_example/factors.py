"""Gradients left as the two factors of a product, for what needs those of many examples.

Where a kernel enters the loss of an example through one product, its gradient is X^T G, of X
`[R, K]` and G `[R, O]`. These are often smaller.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.extend import core

from gradnorm_jax.jaxprs import shape_of
from gradnorm_jax.per_example.analysis import ParameterUse, keeps_entries
from gradnorm_jax.per_example.engine import Loss, Measured
from gradnorm_jax.per_example.layers import is_product, with_probe


def plain_products(loss: Loss) -> dict[str, ParameterUse]:
    """Parameters that are a kernel themselves, in whatever order, of one product without groups."""
    return {
        path: entry
        for path, entry in loss.entries.sole.items()
        if is_product(entry)
        and entry.equation.params.get("feature_group_count", 1) == 1
        and keeps_entries(loss.program, entry.variable)
    }


def factor_places(entries: Mapping[str, ParameterUse]) -> dict[core.Var, Measured]:
    """Places where not a gradient is found, but `(other operand, cotangent of the product)`."""

    def place(path: str, entry: ParameterUse) -> Measured:
        shapes = shape_of(entry.equation.invars[1 - entry.position]), shape_of(_result(entry))
        probe = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return Measured(path, with_probe(entry, lambda *factors: factors), probe)

    return {_result(entry): place(path, entry) for path, entry in entries.items()}


def _result(entry: ParameterUse) -> core.Var:
    return entry.equation.outvars[0]
