"""Running a classifier's program in such a way that its features come out beside its logits."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from gradnorm_jax.adapters.frames import Frame
from gradnorm_jax.adapters.head import Layer
from gradnorm_jax.convolution import faster_rule
from gradnorm_jax.jaxprs import Program, Rule, eval_jaxpr, own_rule


def logits_and_features(
    program: Program, layer: Layer, operands: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    """The program's one result, and what its last layer is given, as `[B, D]`.

    Every equation is done as it is, those of custom derivatives and of recomputation included, but
    for convolutions that are slow on CPUs: see `convolution.convolve`. Only the calls that the last
    layer lies within are opened.
    """
    calls: list[Frame] = []
    frame = layer.output.frame
    while frame.parent is not None:
        calls.insert(0, frame)
        frame = frame.parent
    logits, features = _run(program, calls, layer, *operands)
    features = features.transpose(layer.features_order)
    return logits, features.reshape(logits.shape[0], -1)


def _run(program: Program, calls: Sequence[Frame], layer: Layer, *operands: Any) -> list[Any]:
    """The program's results, and then the operand of the layer that lies within `calls`."""
    captured: list[Any] = []

    def capture(equation: core.JaxprEqn, *operands: Any) -> Any:
        captured.append(operands[layer.position])
        return own_rule(equation)(*operands)

    def enter(equation: core.JaxprEqn, *operands: Any) -> Any:
        inner: Callable[..., list[Any]]
        inner = functools.partial(_run, calls[0].program, calls[1:], layer)
        if equation.primitive.name == "remat2":
            options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
            inner = jax.checkpoint(inner, **options)
        *results, features = inner(*operands)
        captured.append(features)
        return results

    def rule_for(equation: core.JaxprEqn) -> Rule | None:
        if calls and equation is calls[0].call:
            return functools.partial(enter, equation)
        if not calls and equation is layer.output.equation:
            return functools.partial(capture, equation)
        return faster_rule(equation)

    return [*eval_jaxpr(program, rule_for, *operands), *captured]
