"""Why a program does not end in a linear layer, in words: what was met, where, and the cure."""

import functools
import os
import sys
import sysconfig
import traceback
from collections.abc import Collection

from jax.extend import core

from gradnorm_jax.adapters.frames import Ref, inputs_of

_FRAMEWORKS = ("jax", "jaxlib", "flax", "haiku", "equinox", "keras", "gradnorm_jax")
"""Packages whose lines tell a user nothing about the model."""

RETURN_LOGITS = (
    "let the model return the last layer's own output (logits=lambda output: ... picks it from "
    "several), or build the model with find_head=False and take its norms from "
    "gj.gradnorm_of_parameters(model, images, select=...)"
)
WITHOUT_HEAD = (
    "build the model with find_head=False: gj.gradnorm_of_parameters(model, images, select=...) "
    "then gives the exact norms of that layer or of any other"
)

_SPREAD = {  # what makes one row of logits of many
    "reduce_sum": "a sum over positions (pooling)",
    "reduce_max": "a maximum over positions (pooling)",
    "reduce_window_sum": "average pooling",
    "reduce_window_max": "max pooling",
    "argmax": "an argmax",
    "slice": "a slice",
    "dynamic_slice": "a slice",
    "gather": "indexing",
    "scan": "a loop",
    "while": "a loop",
}
_WORDS = {
    **_SPREAD,
    "cond": "a conditional",
    "exp": "an exponential",
    "log": "a logarithm",
    "logistic": "a sigmoid",
    "tanh": "a tanh",
    "max": "a maximum (a ReLU, say)",
    "min": "a minimum",
    "neg": "a change of sign",
    "sub": "a subtraction",
    "select_n": "a choice between arrays",
    "concatenate": "a concatenation",
    "dot_general": "a matrix product",
    "conv_general_dilated": "a convolution",
    "stop_gradient": "a stop of gradients",
    "shard_map": "a shard_map",
}


class NoHeadError(ValueError):
    """The logits do not come from a linear last layer."""


def refusal(ref: Ref, data: Collection[Ref], met: str | None = None) -> NoHeadError:
    """The error for a value that the last layer cannot be reached through.

    Args:
        ref: the value.
        data: the images, which other factors may depend on.
        met: what yields the value, in words; found out if None.
    """
    assert ref.equation is not None
    name = ref.equation.primitive.name
    words, cure = (met, RETURN_LOGITS) if met is not None else _met(ref, data)
    return NoHeadError(
        f"on the way back from the logits to the last layer there is {words} "
        f"({name}{source_line(ref)}), so they are not features @ kernel + bias of one layer: {cure}"
    )


def source_line(ref: Ref) -> str:
    """Where the user's code makes a value: ", FILE:LINE in FUNCTION"; empty if that is unknown."""
    equation, frame = ref.equation, ref.frame
    while equation is not None:
        line = _own_line(equation)
        if line or frame.parent is None:
            return line
        # The equations of a function that JAX keeps compiled do not say who called it.
        equation, frame = frame.call, frame.parent
    return ""


def _own_line(equation: core.JaxprEqn) -> str:
    trace = equation.source_info.traceback
    if trace is None:
        return ""
    for frame, line in reversed(list(traceback.walk_tb(trace.as_python_traceback()))):
        code = frame.f_code
        if not _is_framework(code.co_filename):
            return f", {code.co_filename}:{line} in {code.co_name}"
    return ""


def _met(ref: Ref, data: Collection[Ref]) -> tuple[str, str]:
    """What yields a value, in words, and the cure."""
    assert ref.equation is not None
    name, operands = ref.equation.primitive.name, ref.operands()
    made_by = [each.equation.primitive.name if each.equation else "" for each in operands]
    match name:
        case "div" if made_by[0] == "exp":
            return "a softmax", RETURN_LOGITS
        case "sub" if "log" in made_by or "reduce_max" in _makers(operands):
            return "a log-softmax", RETURN_LOGITS
        case "div" if made_by[0] in _SPREAD:
            return "a mean over positions (pooling)", WITHOUT_HEAD
        case "mul" if not _SPREAD.keys().isdisjoint(made_by) and not all(map(inputs_of, operands)):
            return "a mean over positions (pooling)", WITHOUT_HEAD
        case "mul" | "div":
            verb = "a multiplication by" if name == "mul" else "a division by"
            return f"{verb} {_factor(operands, data)}", RETURN_LOGITS
        case "add" | "add_any":
            return "the addition of something other than a bias parameter", RETURN_LOGITS
    cure = WITHOUT_HEAD if name in _SPREAD else RETURN_LOGITS
    return _WORDS.get(name, "another operation"), cure


def _makers(operands: Collection[Ref]) -> set[str]:
    """The primitives that yield the operands' own operands."""
    inner = [each for operand in operands for each in operand.operands()]
    return {each.equation.primitive.name for each in inner if each.equation}


def _factor(operands: Collection[Ref], data: Collection[Ref]) -> str:
    """What a product multiplies the logits by."""
    inputs = [inputs_of(operand) for operand in operands]
    if not all(inputs):
        return "a constant"
    if all(each.intersection(data) for each in inputs):
        return "something that depends on the images (as in a cosine classifier)"
    return "a parameter (a learned scale or temperature)"


def _is_framework(filename: str) -> bool:
    inside = filename.startswith(_framework_folders())
    standard = sysconfig.get_path("stdlib")
    return (
        inside
        or filename.startswith("<frozen")
        or (filename.startswith(standard) and "site-packages" not in filename)
    )


def _framework_folders() -> tuple[str, ...]:
    loaded = [sys.modules[name] for name in _FRAMEWORKS if name in sys.modules]
    return tuple(_folder(str(module.__file__)) for module in loaded)


@functools.cache
def _folder(filename: str) -> str:
    return os.path.dirname(filename) + os.sep
