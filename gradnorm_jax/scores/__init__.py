"""Pure score functions; in all of them higher means more in-distribution."""

from gradnorm_jax.scores.classes import cadref, fdbd, nci, she
from gradnorm_jax.scores.feature import TiedGaussians, mahalanobis, relative_mahalanobis
from gradnorm_jax.scores.gradient import (
    feature_norm,
    gradnorm,
    gradnorm_by_autodiff,
    gradnorm_of_parameters,
    one_hot_prediction,
    residual_norm,
    smoothed_prediction,
)
from gradnorm_jax.scores.neighbors import knn, nnguide
from gradnorm_jax.scores.output import (
    energy,
    entropy,
    gen,
    kl_matching,
    max_logit,
    msp,
    odin,
)
from gradnorm_jax.scores.rectify import (
    ash_b,
    ash_p,
    ash_s,
    optfs,
    outputs_of,
    react,
    scale,
    vra,
)
from gradnorm_jax.scores.subspace import Principal, Residual, neco, residual, vim
from gradnorm_jax.scores.weiper import Densities, Perturbation, weiper

__all__ = [
    "Densities",
    "Perturbation",
    "Principal",
    "Residual",
    "TiedGaussians",
    "ash_b",
    "ash_p",
    "ash_s",
    "cadref",
    "energy",
    "entropy",
    "fdbd",
    "feature_norm",
    "gen",
    "gradnorm",
    "gradnorm_by_autodiff",
    "gradnorm_of_parameters",
    "kl_matching",
    "knn",
    "mahalanobis",
    "max_logit",
    "msp",
    "nci",
    "neco",
    "nnguide",
    "odin",
    "one_hot_prediction",
    "optfs",
    "outputs_of",
    "react",
    "relative_mahalanobis",
    "residual",
    "residual_norm",
    "scale",
    "she",
    "smoothed_prediction",
    "vim",
    "vra",
    "weiper",
]
