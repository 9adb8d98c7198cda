"""Options of detectors, checked against the annotations of the functions that take them."""

import contextlib
import dataclasses
import functools
import inspect
import math
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import jax

from gradnorm_jax.detectors.detector import Detector
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.detectors.rectifier import Rectifier
from gradnorm_jax.numerics import is_number

P = ParamSpec("P")
Built = TypeVar("Built", Detector, Rectifier, Reading)


class Bare(str):
    """A word of a spec without quotes, which means what the option's type makes of it."""

    __slots__ = ()


def builder(build: Callable[P, Built]) -> Callable[P, Built]:
    """Decorates a function of typed keyword options that returns a detector or a rectifier.

    The options are checked against their annotations, and those that are not the default become
    part of the name: `gradnorm(ord=2)` is called "gradnorm(ord=2)".
    """
    hints, _, _ = signature_options(build)

    @functools.wraps(build)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Built:
        options = check_options(build.__name__, kwargs, hints)
        built = build(*args, **options)
        return dataclasses.replace(built, name=_show_call(built.name, build, options))

    return checked


def signature_options(build: Callable[..., Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Annotations by option, the options without a default, and whether it takes any others."""
    parameters = inspect.signature(build, eval_str=True).parameters.values()
    named = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    hints = {p.name: Any if p.annotation is p.empty else p.annotation for p in named}
    needed = [p.name for p in named if p.default is p.empty]
    return hints, needed, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_options(
    detector: str, options: Mapping[str, Any], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """The options as their annotations have them: numbers as floats, lists as tuples.

    Args:
        detector: its name, for errors.
        options: values by option, from Python or, as `Bare`, from text.
        hints: annotations by option. Those that are none of bool, int, float, str, Path, None,
            Literal, a sequence, or a union of these take any value.

    Raises:
        ValueError: a value has the wrong type.
    """
    return {
        name: _check_option(f"option {name} of {detector}", value, hints.get(name, Any))
        for name, value in options.items()
    }


def _check_option(where: str, value: Any, hint: Any) -> Any:
    for kind in sorted(_alternatives(hint), key=_is_text):
        try:
            return _convert(value, kind)
        except ValueError:
            continue
    takes = " or ".join(dict.fromkeys(map(_describe, _alternatives(hint))))
    shown = str(value) if isinstance(value, Bare) else repr(value)
    raise ValueError(f"{where} takes {takes}, got {shorten(shown)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_text(kind: Any) -> bool:
    # Every word is a text, so whatever else it might be comes first.
    return kind not in (bool, int, float, types.NoneType)


def _convert(value: Any, kind: Any) -> Any:
    """The value as an annotation has it; ValueError if it is none."""
    if isinstance(value, Bare):
        value = _read(value, kind)
    if _is_list(kind) or (kind is Any and isinstance(value, list)):
        return _convert_items(value, kind)
    if kind in (int, float):
        return _convert_number(value, kind)
    if kind is pathlib.Path and isinstance(value, str):
        value = pathlib.Path(value)
    if typing.get_origin(kind) is Literal:
        accepted = value in typing.get_args(kind)
    else:
        accepted = kind not in (bool, str, pathlib.Path, types.NoneType) or isinstance(value, kind)
    if not accepted:
        raise ValueError
    return value


def _is_list(kind: Any) -> bool:
    container = typing.get_origin(kind) or kind
    return inspect.isclass(container) and container is not str and issubclass(container, Sequence)


def _convert_items(value: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    (item, *_) = typing.get_args(kind) or (Any,)
    return tuple(_check_option("", each, item) for each in value)


def _convert_number(value: Any, kind: type) -> Any:
    if isinstance(value, jax.core.Tracer) or not is_number(value):
        raise ValueError
    try:
        number = kind(value)
    except OverflowError as error:
        raise ValueError from error
    if math.isnan(number) or (kind is int and number != value):
        raise ValueError
    return number


def _read(text: Bare, kind: Any) -> Any:
    """What a word means where `kind` is expected; a text where it means nothing."""
    if typing.get_origin(kind) is Literal:
        meanings = {str(each): each for each in typing.get_args(kind)}
    elif kind is types.NoneType:
        meanings = {"None": None}
    elif kind is bool:
        meanings = {text: text.lower() == "true"} if text.lower() in ("true", "false") else {}
    elif kind in (int, float):
        meanings = _numbers(text)
    elif kind is Any:
        words = {"None": None, "True": True, "true": True, "False": False, "false": False}
        meanings = words | _numbers(text)
    else:
        meanings = {}
    return meanings.get(text, str(text))


def _numbers(text: str) -> dict[str, Any]:
    """The number that a text is, by the text; nothing for nan, or for 1e999, which is not inf."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(text)
            infinite = text.lstrip("+-").lower() in ("inf", "infinity")
            return {text: number} if abs(number) < math.inf or infinite else {}
    return {}


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if _is_list(kind):
        (item, *_) = typing.get_args(kind) or (Any,)
        return f"a list, each {_describe(item)}"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        pathlib.Path: "a path",
        types.NoneType: "None",
    }
    return names.get(kind, "any value")


def _show_call(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> str:
    shown = [
        f"{option}={show_value(options[option])}"
        for option, parameter in inspect.signature(build).parameters.items()
        if option in options and options[option] != parameter.default
    ]
    return "".join(f"{name}({','.join(shown)})".split()) if shown else name


def show_value(value: Any) -> str:
    """An option's value as a spec has it."""
    match value:
        case float() if value.is_integer() and abs(value) < 1e16:
            return str(int(value))
        case tuple():
            return f"[{','.join(map(show_value, value))}]"
        case str() if is_bare(value):
            return value
    return repr(value)


def is_bare(text: str) -> bool:
    """Whether a text can be written in a spec without quotes."""
    return bool(text) and not any(c.isspace() or c in ",()[]=\"'" for c in text)


def shorten(text: str) -> str:
    """A text that fits into an error message."""
    return text if len(text) <= 80 else f"{text[:77]}..."
