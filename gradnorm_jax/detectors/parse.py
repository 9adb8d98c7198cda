"""Detectors from text such as `gradnorm(ord=2)`, `react+msp` or `my_module:mine(option=1)`."""

import collections
import dataclasses
import difflib
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gradnorm_jax.detectors.detector import Detector
from gradnorm_jax.detectors.options import Bare, check_options, is_bare, shorten, signature_options
from gradnorm_jax.detectors.output import energy
from gradnorm_jax.detectors.rectifier import Rectifier, compose
from gradnorm_jax.detectors.table import DETECTORS, is_group, names_of_group

_TOKEN = re.compile(r"""\s*('[^']*'|"[^"]*"|[,()\[\]=]|[^\s,()\[\]='"]+|['"])""")
_NAME = re.compile(r"[^\W\d][\w.]*(:[^\W\d][\w.]*)?")

Tokens = collections.deque[str]


def parse_detectors(
    specs: Iterable[str | Detector | Rectifier],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Detector, ...]:
    """Detectors from text such as `msp` or `react(quantile=0.95)+gradnorm(ord=inf)`.

    A value is read as its option's annotation says: `true` or `false`, a number or `inf`, a word or
    path with or without quotes, or a list of such in brackets. Rectifiers stand before the detector
    that sees what they leave, with `+` between them; alone they stand for themselves with `energy`.

    Args:
        specs: detectors, which pass through, or texts: a name in `DETECTORS`, or `module:name` of a
            `Detector` or `Rectifier` or of a function that returns one, each with its options in
            parentheses if need be. The text, spaces removed, becomes the detector's name. `all` is
            all that need no option, `all:gradient` those of a space.
        defaults: options by name in `DETECTORS`, which a text may override.

    Returns:
        The detectors in the order of `specs`.

    Raises:
        ValueError: a text cannot be read, names no detector, or has a wrong option; or two
            detectors have the same name.
    """
    if isinstance(specs, str | Detector | Rectifier):
        specs = [specs]
    detectors = tuple(d for spec in specs for d in _to_detectors(spec, defaults or {}))
    names = [detector.name for detector in detectors]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"detector {name!r} is asked for more than once; name it once")
    if not detectors:
        raise ValueError("no detectors are asked for; name one, or write all")
    return detectors


def _to_detectors(
    spec: str | Detector | Rectifier, defaults: Mapping[str, Mapping[str, Any]]
) -> list[Detector]:
    if not is_group(spec):
        return [_to_detector(spec, defaults)]
    members = (_to_detector(name, defaults) for name in names_of_group(str(spec)))
    return [dataclasses.replace(each, optional=True) for each in members]


def _to_detector(
    spec: str | Detector | Rectifier, defaults: Mapping[str, Mapping[str, Any]]
) -> Detector:
    if isinstance(spec, Detector):
        return spec
    if isinstance(spec, Rectifier):
        return dataclasses.replace(compose(spec, energy()), name=spec.name)
    if not isinstance(spec, str):
        raise ValueError(
            f"a detector is given by its name or as a Detector, got {shorten(repr(spec))}; a "
            "function that builds one must be called: msp()"
        )
    *before, last = (_to_term(term, defaults) for term in split_terms(spec))
    detector = compose(last, energy()) if isinstance(last, Rectifier) else last
    for rectifier in reversed(before):
        if isinstance(rectifier, Detector):
            raise ValueError(
                f"{rectifier.name!r} in {spec!r} is a detector, behind which nothing can come: "
                "write RECTIFIER+DETECTOR"
            )
        detector = compose(rectifier, detector)
    return dataclasses.replace(detector, name="".join(spec.split()))


def split_terms(spec: str) -> list[str]:
    """The terms of `react(quantile=0.9)+msp`; within brackets a plus is part of a value."""
    depth, ends = 0, []
    for found in _TOKEN.finditer(spec):
        token = found[1]
        depth += (token in "([") - (token in ")]")
        if depth == 0:
            ends += [found.start(1) + i for i, c in enumerate(token) if c == "+"]
    starts = [0, *(end + 1 for end in ends)]
    return [spec[a:b] for a, b in zip(starts, [*ends, len(spec)], strict=True)]


def modules_named(spec: str) -> set[str]:
    """The modules whose code reading a spec would run: those of `module:name`."""
    targets = [_read_call(term)[0] for term in split_terms(spec)]
    return {target.partition(":")[0] for target in targets if ":" in target}


def _to_term(spec: str, defaults: Mapping[str, Mapping[str, Any]]) -> Detector | Rectifier:
    target, options = _read_call(spec)
    found = _import(target) if ":" in target else _known(target)
    if isinstance(found, Detector | Rectifier):
        if options:
            raise ValueError(f"{target!r} is a Detector and takes no options; leave them out")
        return found
    if not callable(found):
        raise ValueError(
            f"{target!r} must be a Detector or a function that returns one, got {found!r}"
        )
    return _build(target, found, options, defaults.get(target, {}))


def _known(name: str) -> Callable[..., Detector | Rectifier]:
    if name not in DETECTORS:
        close = difflib.get_close_matches(name, DETECTORS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown detector {name!r}: {hint}`gradnorm-jax detectors` lists them")
    return DETECTORS[name].build


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:  # of the user's module, whatever it raises
        raise ValueError(
            f"cannot import detector {target!r}: {type(error).__name__}: {error}"
        ) from error


def _build(
    target: str, build: Callable[..., Any], options: dict[str, Any], defaults: Mapping[str, Any]
) -> Detector | Rectifier:
    hints, needed, open_ended = signature_options(build)
    for option in options:
        if option not in hints and not open_ended:
            raise ValueError(
                f"detector {target!r} has no option {option!r}; it has: "
                f"{', '.join(hints) or 'none'}"
            )
    given = {**defaults, **check_options(target, options, hints)}
    for option in needed:
        if option not in given:
            raise ValueError(f"detector {target!r} needs its option {option}: {option}=...")
    try:
        detector = build(**given)
    except TypeError as error:
        raise ValueError(f"detector {target!r} cannot be built: {error}") from error
    if not isinstance(detector, Detector | Rectifier):
        raise ValueError(f"{target!r} must return a Detector, got {shorten(repr(detector))}")
    return detector


class _GrammarError(Exception):
    """The text breaks the grammar of specs."""


def _read_call(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a spec, with values as `Bare`, `str` or a list of such."""
    tokens = collections.deque(_TOKEN.findall(spec))
    try:
        target = tokens.popleft()
        options = _read_options(tokens) if tokens else {}
        if tokens or not _NAME.fullmatch(target):
            raise _GrammarError
    except (_GrammarError, IndexError):
        raise ValueError(
            f"cannot read detector {shorten(repr(spec))}; write NAME or NAME(option=value, ...), "
            "with quotes around a value that has spaces, commas, brackets or '=' in it"
        ) from None
    return target, options


def _read_options(tokens: Tokens) -> dict[str, Any]:
    options: dict[str, Any] = {}
    _expect(tokens, "(")
    while tokens[0] != ")":
        name = tokens.popleft()
        if not name.isidentifier():
            raise _GrammarError
        _expect(tokens, "=")
        if name in options:
            raise ValueError(f"option {name} is given more than once; give it once")
        options[name] = _read_value(tokens)
        if tokens[0] != ")":
            _expect(tokens, ",")
    _expect(tokens, ")")
    return options


def _read_value(tokens: Tokens) -> Any:
    token = tokens.popleft()
    closing = {"(": ")", "[": "]"}.get(token)
    if closing is None:
        return _read_word(token)
    items = []
    while tokens[0] != closing:
        items.append(_read_word(tokens.popleft()))
        if tokens[0] != closing:
            _expect(tokens, ",")
    _expect(tokens, closing)
    return items


def _read_word(token: str) -> str:
    if is_bare(token):
        return Bare(token)
    if len(token) == 1:
        raise _GrammarError
    return token[1:-1]


def _expect(tokens: Tokens, mark: str) -> None:
    if tokens.popleft() != mark:
        raise _GrammarError
