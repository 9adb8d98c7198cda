"""Gradients left as the two factors of a product, for what needs those of many examples.

Where a kernel enters the loss of an example through one product, its gradient is X^T G, of X
`[R, K]` and G `[R, O]`. These are often smaller.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from gradnorm_jax.jaxprs import Rule, eval_jaxpr, own_rule, shape_of
from gradnorm_jax.per_example.analysis import ParameterUse, find_entries, keeps_entries
from gradnorm_jax.per_example.layers import is_product
from gradnorm_jax.per_example.placement import as_varying
from gradnorm_jax.per_example.program import Loss, batchable_rule


def plain_products(loss: Loss) -> dict[str, ParameterUse]:
    """Parameters that are a kernel themselves, in whatever order, of one product without groups."""
    return {
        path: entry
        for path, entry in find_entries(loss.program, loss.origins).sole.items()
        if is_product(entry)
        and entry.equation.params.get("feature_group_count", 1) == 1
        and keeps_entries(loss.program, entry.variable)
    }


def factor_function(
    loss: Loss, entries: Mapping[str, ParameterUse]
) -> Callable[[Any], dict[str, Any]]:
    """`example -> {path: gradient}`, for those in `entries` its factors in place of it.

    These are the product's other operand, and its cotangent.
    """
    paths = {entry.equation.outvars[0]: path for path, entry in entries.items()}
    shapes = {path: shape_of(result) for result, path in paths.items()}
    probes = as_varying({path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()})
    leaves = {path: loss.leaves[path] for path in loss.selected if path not in entries}

    def value(variables: tuple[Any, Any], example: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        leaves, probes = variables
        others = {}

        def rule_for(equation: core.JaxprEqn) -> Rule | None:
            rule = batchable_rule(equation)
            path = paths.get(equation.outvars[0]) if equation.outvars else None
            if path is None:
                return rule
            return functools.partial(with_probe, path, rule or own_rule(equation))

        def with_probe(path: str, rule: Rule, *operands: jax.Array) -> jax.Array:
            others[path] = operands[1 - entries[path].position]
            return rule(*operands) + probes[path]

        (result,) = eval_jaxpr(loss.program, rule_for, *loss.operands(leaves, example))
        return result, others

    def gradients(example: Any) -> dict[str, Any]:
        (found, cotangents), others = jax.grad(value, has_aux=True)((leaves, probes), example)
        found |= {path: (others[path], cotangent) for path, cotangent in cotangents.items()}
        return {path: found[path] for path in loss.selected}

    return gradients
