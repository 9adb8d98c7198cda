"""The table of all detectors, by the name that a spec gives them."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from gradnorm_jax.detectors.detector import Detector
from gradnorm_jax.detectors.feature import mahalanobis
from gradnorm_jax.detectors.gradient import gradnorm
from gradnorm_jax.detectors.output import energy, msp, odin

Space = Literal["output", "feature", "rectified", "gradient"]
"""What a score is made of: logits, features, both after a rectifier, or gradients."""


class Row(NamedTuple):
    """A detector that is known by name.

    Attributes:
        build: the function that makes it, of its options.
        space: what the score is made of.
        paper: where it is from.
        example: a value for each option without a default.
    """

    build: Callable[..., Detector]
    space: Space
    paper: str
    example: Mapping[str, Any] = MappingProxyType({})


_ROWS = (
    Row(msp, "output", "Hendrycks & Gimpel 2017, arXiv:1610.02136"),
    Row(odin, "output", "Liang et al. 2018, arXiv:1706.02690"),
    Row(energy, "output", "Liu et al. 2020, arXiv:2010.03759"),
    Row(mahalanobis, "feature", "Lee et al. 2018, arXiv:1807.03888"),
    Row(gradnorm, "gradient", "Huang et al. 2021, arXiv:2110.00218"),
)
DETECTORS: Mapping[str, Row] = {row.build.__name__: row for row in _ROWS}


def expand(specs: Iterable[Any]) -> list[Any]:
    """The specs, with names for `all` detectors that need no option, or those of `all:SPACE`.

    Raises:
        ValueError: there is no such space.
    """
    return [each for spec in specs for each in (_names(spec) if _is_group(spec) else [spec])]


def _is_group(spec: Any) -> bool:
    return isinstance(spec, str) and (spec == "all" or spec.startswith("all:"))


def _names(group: str) -> list[str]:
    _, _, space = group.partition(":")
    if group != "all" and space not in get_args(Space):
        raise ValueError(f"no detectors {group!r}: write all, or all: and {_listed(Space)}")
    return [name for name, row in DETECTORS.items() if space in ("", row.space) and not row.example]


def _listed(literal: Any) -> str:
    *others, last = get_args(literal)
    return f"{', '.join(others)} or {last}"
