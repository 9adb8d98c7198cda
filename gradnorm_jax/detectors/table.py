"""The table of all detectors, by the name that a spec gives them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from gradnorm_jax.detectors.classes import cadref, fdbd, nci, she
from gradnorm_jax.detectors.curvature import (
    exgrad,
    feature_hessian,
    fisher_mahalanobis,
    fisher_trace,
    gini,
    grad_uncertainty,
    pnml,
    scod,
)
from gradnorm_jax.detectors.density import weiper
from gradnorm_jax.detectors.detector import Detector
from gradnorm_jax.detectors.feature import (
    gaussian,
    mahalanobis,
    mahalanobis_plus_plus,
    relative_mahalanobis,
    relative_mahalanobis_plus_plus,
)
from gradnorm_jax.detectors.gradient import feature_norm, gradnorm, residual_norm
from gradnorm_jax.detectors.gradient_subspace import average_gradient, gradorth, gradpca
from gradnorm_jax.detectors.grood import grood
from gradnorm_jax.detectors.inner import (
    gaia_a,
    gaia_z,
    layer_features,
    layer_gradients,
    layer_norms,
    mahalanobis_layers,
    nac_layers,
)
from gradnorm_jax.detectors.neighbors import knn, nnguide
from gradnorm_jax.detectors.neurons import gsc, nac
from gradnorm_jax.detectors.output import (
    energy,
    entropy,
    gen,
    kl_matching,
    max_logit,
    msp,
    odin,
    temperature_scaling,
)
from gradnorm_jax.detectors.perturbation import adascale_a, adascale_l, approximate_mass, pro
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.detectors.rectified import ash_b, ash_p, ash_s, dice, optfs, react, scale, vra
from gradnorm_jax.detectors.rectifier import Rectifier
from gradnorm_jax.detectors.subspace import neco, residual, vim

Space = Literal["output", "feature", "rectified", "gradient", "inner"]
"""What a score is made of: logits, features, both after a rectifier, gradients of the last layer,
or what takes further passes: inner layers, derivatives with respect to them, inputs that move."""


class Row(NamedTuple):
    """A detector, a rectifier of features or a reading that is known by name.

    Attributes:
        build: the function that makes it, of its options.
        space: what the score is made of.
        paper: where it is from.
        example: a value for each option without a default.
    """

    build: Callable[..., Detector | Rectifier | Reading]
    space: Space
    paper: str
    example: Mapping[str, Any] = MappingProxyType({})


_ROWS = (
    Row(msp, "output", "Hendrycks & Gimpel 2017, arXiv:1610.02136"),
    Row(odin, "output", "Liang et al. 2018, arXiv:1706.02690"),
    Row(energy, "output", "Liu et al. 2020, arXiv:2010.03759"),
    Row(max_logit, "output", "Hendrycks et al. 2022, arXiv:1911.11132"),
    Row(entropy, "output", "Hendrycks & Gimpel 2017, arXiv:1610.02136"),
    Row(temperature_scaling, "output", "Guo et al. 2017, arXiv:1706.04599"),
    Row(gen, "output", "Liu et al. 2023, CVPR"),
    Row(kl_matching, "output", "Hendrycks et al. 2022, arXiv:1911.11132"),
    Row(gini, "output", "Igoe et al. 2022, arXiv:2205.10439"),
    Row(gaussian, "feature", "Dauncey et al. 2024, arXiv:2403.01485"),
    Row(mahalanobis, "feature", "Lee et al. 2018, arXiv:1807.03888"),
    Row(relative_mahalanobis, "feature", "Ren et al. 2021, arXiv:2106.09022"),
    Row(mahalanobis_plus_plus, "feature", "Mueller & Hein 2025, arXiv:2505.18032"),
    Row(relative_mahalanobis_plus_plus, "feature", "Mueller & Hein 2025, arXiv:2505.18032"),
    Row(knn, "feature", "Sun et al. 2022, arXiv:2204.06507"),
    Row(nnguide, "feature", "Park et al. 2023, arXiv:2309.14888"),
    Row(vim, "feature", "Wang et al. 2022, arXiv:2203.10807"),
    Row(residual, "feature", "Wang et al. 2022, arXiv:2203.10807"),
    Row(neco, "feature", "Ben Ammar et al. 2024, arXiv:2310.06823"),
    Row(she, "feature", "Zhang et al. 2023, ICLR"),
    Row(fdbd, "feature", "Liu & Qin 2024, arXiv:2312.11536"),
    Row(nci, "feature", "Liu & Qin 2025, arXiv:2311.01479"),
    Row(cadref, "feature", "Ling et al. 2025, CVPR"),
    Row(weiper, "feature", "Granz et al. 2024, arXiv:2405.17164"),
    Row(react, "rectified", "Sun et al. 2021, arXiv:2111.12797"),
    Row(dice, "rectified", "Sun & Li 2022, arXiv:2111.09805"),
    Row(ash_p, "rectified", "Djurisic et al. 2023, arXiv:2209.09858"),
    Row(ash_b, "rectified", "Djurisic et al. 2023, arXiv:2209.09858"),
    Row(ash_s, "rectified", "Djurisic et al. 2023, arXiv:2209.09858"),
    Row(scale, "rectified", "Xu et al. 2024, arXiv:2310.00227"),
    Row(vra, "rectified", "Xu et al. 2023, arXiv:2302.11716"),
    Row(optfs, "rectified", "Zhao et al. 2024, arXiv:2402.00865"),
    Row(gradnorm, "gradient", "Huang et al. 2021, arXiv:2110.00218"),
    Row(feature_norm, "gradient", "Huang et al. 2021, arXiv:2110.00218"),
    Row(residual_norm, "gradient", "Huang et al. 2021, arXiv:2110.00218"),
    Row(exgrad, "gradient", "Igoe et al. 2022, arXiv:2205.10439", {"sign": 1}),
    Row(fisher_trace, "gradient", "Sharma et al. 2021, arXiv:2102.12567"),
    Row(grad_uncertainty, "gradient", "Lee et al. 2023, arXiv:2304.02834"),
    Row(feature_hessian, "gradient", "Park et al. 2026, arXiv:2606.29952"),
    Row(fisher_mahalanobis, "gradient", "Madras et al. 2019, arXiv:1910.09573"),
    Row(scod, "gradient", "Sharma et al. 2021, arXiv:2102.12567"),
    Row(pnml, "gradient", "Bibas et al. 2021, arXiv:2110.09246"),
    Row(gradorth, "gradient", "Behpour et al. 2023, arXiv:2308.00310"),
    Row(gradpca, "gradient", "Seleznova et al. 2025, arXiv:2505.16017"),
    Row(average_gradient, "gradient", "Wu et al. 2023, arXiv:2310.17163"),
    Row(grood, "gradient", "ElAraby et al. 2025, arXiv:2312.14427"),
    Row(nac, "gradient", "Liu et al. 2024, arXiv:2306.02879"),
    Row(gsc, "gradient", "Gu et al. 2025, arXiv:2507.01417"),
    Row(adascale_a, "inner", "Regmi 2025, arXiv:2503.08023"),
    Row(adascale_l, "inner", "Regmi 2025, arXiv:2503.08023"),
    Row(pro, "inner", "Chen et al. 2025, arXiv:2503.18784"),
    Row(approximate_mass, "inner", "Grathwohl et al. 2020, arXiv:1912.03263"),
    Row(gaia_z, "inner", "Chen et al. 2023, arXiv:2311.09620"),
    Row(gaia_a, "inner", "Chen et al. 2023, arXiv:2311.09620"),
    Row(nac_layers, "inner", "Liu et al. 2024, arXiv:2306.02879"),
    Row(mahalanobis_layers, "inner", "Lee et al. 2018, arXiv:1807.03888"),
    Row(layer_norms, "inner", "Dauncey et al. 2024, arXiv:2403.01485"),
    Row(layer_features, "inner", "Lee et al. 2018, arXiv:1807.03888"),
    Row(layer_gradients, "inner", "Seleznova et al. 2025, arXiv:2505.16017", {"select": "head"}),
)
DETECTORS: Mapping[str, Row] = {row.build.__name__: row for row in _ROWS}


def is_group(spec: Any) -> bool:
    """Whether a spec stands for several detectors: `all`, or `all:SPACE`."""
    return isinstance(spec, str) and (spec == "all" or spec.startswith("all:"))


def names_of_group(group: str) -> list[str]:
    """The names of `all` detectors that need no option, or of those of `all:SPACE`.

    `all` are those of one forward pass: the space "inner" is asked for by its name.

    Raises:
        ValueError: there is no such space.
    """
    _, _, space = group.partition(":")
    if group != "all" and space not in get_args(Space):
        raise ValueError(f"no detectors {group!r}: write all, or all: and {_listed(Space)}")
    spaces = {space} if space else {each for each in get_args(Space) if each != "inner"}
    return [name for name, row in DETECTORS.items() if row.space in spaces and not row.example]


def _listed(literal: Any) -> str:
    *others, last = get_args(literal)
    return f"{', '.join(others)} or {last}"
