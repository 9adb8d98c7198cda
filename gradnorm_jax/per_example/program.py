"""The loss of one example as a program, and the rules under which its gradients batch well."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gradnorm_jax import convolution
from gradnorm_jax.jaxprs import (
    Program,
    Rule,
    body,
    eval_jaxpr,
    everywhere,
    inline_calls,
    inner_programs,
    own_rule,
)
from gradnorm_jax.kernel_gradients import kernel_gradient
from gradnorm_jax.per_example.analysis import Origins
from gradnorm_jax.tree import Params
from gradnorm_jax.windows import Parameters

_NAME = "convolution_with_batchable_gradient"


class Loss(NamedTuple):
    """The loss of one example.

    Attributes:
        program: takes `constants`, then the leaves of the parameters, then those of an example.
        constants: arrays that the loss function closes over, and that are bound to it.
        leaves: of the parameters, by path.
        selected: paths of the parameters to differentiate with respect to.
        origins: what each operand of the program is.
    """

    program: Program
    constants: list[jax.Array]
    leaves: dict[str, jax.Array]
    selected: tuple[str, ...]
    origins: list[Origins]

    def operands(self, leaves: dict[str, jax.Array], example: Any) -> list[Any]:
        """Of the program, with some leaves in place of the parameters' own."""
        return [*self.constants, *(self.leaves | leaves).values(), *jax.tree.leaves(example)]


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

    return inline(jax.make_jaxpr(loss)(loss_fn, params, example))


def trace_function(function: Callable[..., Any], params: Params, example: Any) -> Program:
    """The program `(function's arrays, params, example) -> results` of one example, inlined."""

    def results(function: Callable[..., Any], params: Params, example: Any) -> Any:
        outputs = function(params, jax.tree.map(lambda x: x[None], example))
        return jax.tree.map(lambda x: x[0], outputs)

    return inline(jax.make_jaxpr(results)(function, params, example))


def inline(program: Program) -> Program:
    """The program with all calls inlined, but for those in loops and other programs in it."""
    inlined = functools.partial(inline_calls, program, convolution.plain_rule)
    return jax.make_jaxpr(inlined)(*[variable.aval for variable in body(program).invars])


def batchable_rule(equation: core.JaxprEqn) -> Rule | None:
    """Rules under which gradients batch well: that of `_convolve`, wherever there is one."""
    return everywhere(_rule_for_convolutions)(equation)


def differentiated_rule(equation: core.JaxprEqn) -> Rule | None:
    """Rules by which the program of a gradient can be differentiated again, either way.

    What the gradient does not go through is left in it with a rule for the reverse way only.
    """
    return everywhere(_rule_for_what_is_left)(equation)


def convolutions(program: Program) -> list[core.JaxprEqn]:
    """All equations that convolve, those of inner programs included."""
    found = []
    for equation in body(program).eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(equation)
        for inner in inner_programs(equation):
            found.extend(convolutions(inner))
    return found


def _rule_for_convolutions(equation: core.JaxprEqn) -> Rule | None:
    params = equation.params
    if equation.primitive.name != "conv_general_dilated" or params["batch_group_count"] > 1:
        return None
    return functools.partial(_convolve, params)


def _rule_for_what_is_left(equation: core.JaxprEqn) -> Rule | None:
    if equation.primitive.name != "custom_vjp_call":
        return None
    program = equation.params["call_jaxpr"]
    names = [each.params.get("name") for each in body(program).eqns]
    return functools.partial(eval_jaxpr, program, own_rule) if names == [_NAME] else None


def _convolve(parameters: Parameters, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The convolution, its gradient for `rhs` made of products."""
    plain = functools.partial(convolution.convolve, parameters=parameters)

    def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return plain(lhs, rhs)

    def forward(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return plain(lhs, rhs), (lhs, rhs)

    def backward(
        operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        lhs, rhs = operands
        (of_lhs,) = jax.linear_transpose(lambda lhs: plain(lhs, rhs), lhs)(cotangent)
        return of_lhs, kernel_gradient(lhs, rhs, cotangent, parameters)

    convolve.__name__ = _NAME
    function = jax.custom_vjp(jax.jit(convolve))
    function.defvjp(forward, backward)
    return function(lhs, rhs)
