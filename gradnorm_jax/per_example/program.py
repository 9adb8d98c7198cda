"""The loss of one example as a program, and the rules under which its gradients batch well."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gradnorm_jax.jaxprs import Program, Rule, body, eval_jaxpr, inline_calls, inner_programs
from gradnorm_jax.per_example.convolution import convolve
from gradnorm_jax.tree import Params


def trace_loss(loss_fn: Callable[..., jax.Array], params: Params, example: Any) -> Program:
    """The program `(loss_fn's arrays, params, example) -> loss` with all calls inlined.

    Raises:
        TypeError: the loss of a batch of one is not a real array of shape `[1]`.
    """

    def loss(loss_fn: Callable[..., jax.Array], params: Params, example: Any) -> jax.Array:
        losses = loss_fn(params, jax.tree.map(lambda x: x[None], example))
        shape, dtype = getattr(losses, "shape", None), getattr(losses, "dtype", np.dtype(object))
        if shape != (1,) or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                "loss_fn(params, batch) must return real losses of shape [B], nothing beside them; "
                f"for a batch of one example it returned {jax.tree.map(jax.typeof, losses)}"
            )
        return losses[0]

    operands = jax.tree.leaves((loss_fn, params, example))
    program = jax.make_jaxpr(loss)(loss_fn, params, example)
    return jax.make_jaxpr(lambda *operands: inline_calls(program, *operands))(*operands)


def batchable_rule(equation: core.JaxprEqn) -> Rule | None:
    """Rules under which gradients batch well: that of `convolve`, wherever there is one."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" and params["batch_group_count"] == 1:
        return lambda lhs, rhs: convolve(lhs, rhs, params)
    if not any(map(_has_convolution, inner_programs(equation))):
        return None
    if name == "remat2":
        rewritten = jax.checkpoint(
            lambda *operands: eval_jaxpr(params["jaxpr"], batchable_rule, *operands),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        return rewritten
    if name == "cond":
        branches = tuple(map(_rewrite, params["branches"]))
        return lambda *operands: equation.primitive.bind(
            *operands, **{**params, "branches": branches}
        )
    if name == "scan":
        loop = _rewrite(params["jaxpr"])
        return lambda *operands: equation.primitive.bind(*operands, **{**params, "jaxpr": loop})
    return None


def convolutions(program: Program) -> list[core.JaxprEqn]:
    """All equations that convolve, those of inner programs included."""
    found = []
    for equation in body(program).eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(equation)
        for inner in inner_programs(equation):
            found.extend(convolutions(inner))
    return found


def _has_convolution(program: Program) -> bool:
    return bool(convolutions(program))


def _rewrite(program: Program) -> Program:
    """The same program, by rules under which its gradients batch well."""
    inputs = [variable.aval for variable in body(program).invars]
    return jax.make_jaxpr(lambda *operands: eval_jaxpr(program, batchable_rule, *operands))(*inputs)
