"""The table of all detectors, by the name that a spec gives them."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

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
    """

    build: Callable[..., Detector]
    space: Space
    paper: str


_ROWS = (
    Row(msp, "output", "Hendrycks & Gimpel 2017, arXiv:1610.02136"),
    Row(odin, "output", "Liang et al. 2018, arXiv:1706.02690"),
    Row(energy, "output", "Liu et al. 2020, arXiv:2010.03759"),
    Row(mahalanobis, "feature", "Lee et al. 2018, arXiv:1807.03888"),
    Row(gradnorm, "gradient", "Huang et al. 2021, arXiv:2110.00218"),
)
DETECTORS: Mapping[str, Row] = {row.build.__name__: row for row in _ROWS}
