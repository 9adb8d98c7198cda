"""Detectors: scores in the one shape that the evaluation gives to all of them.

A detector is a frozen value; see `Detector`. Adding one takes a pure function in
`gradnorm_jax.scores` and a row in `DETECTORS`; your own takes the function alone:

>>> mine = Detector("mine", "logits", lambda state, model, batch: batch.outputs.logits.max(axis=-1))
"""

from gradnorm_jax.detectors.activations import gram, rankfeat
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
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, Needs
from gradnorm_jax.detectors.feature import (
    gaussian,
    mahalanobis,
    mahalanobis_plus_plus,
    relative_mahalanobis,
    relative_mahalanobis_plus_plus,
)
from gradnorm_jax.detectors.gradient import feature_norm, gradnorm, gradnorm_pass, residual_norm
from gradnorm_jax.detectors.gradient_subspace import average_gradient, gradorth, gradpca
from gradnorm_jax.detectors.grood import grood
from gradnorm_jax.detectors.inner import (
    gaia_a,
    gaia_z,
    mahalanobis_layers,
    nac_layers,
)
from gradnorm_jax.detectors.layer_readings import (
    gradient_projection,
    layer_features,
    layer_gradients,
    layer_norms,
)
from gradnorm_jax.detectors.neighbors import knn, nnguide
from gradnorm_jax.detectors.network_pass import NetworkPass, network_passes, take_passes
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
from gradnorm_jax.detectors.parse import parse_detectors
from gradnorm_jax.detectors.perturbation import adascale_a, adascale_l, approximate_mass, pro
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.detectors.rectified import ash_b, ash_p, ash_s, dice, optfs, react, scale, vra
from gradnorm_jax.detectors.rectifier import Rectifier, compose
from gradnorm_jax.detectors.subspace import neco, residual, vim
from gradnorm_jax.detectors.table import DETECTORS

__all__ = [
    "DETECTORS",
    "Batch",
    "Detector",
    "Fit",
    "Needs",
    "NetworkPass",
    "Reading",
    "Rectifier",
    "adascale_a",
    "adascale_l",
    "approximate_mass",
    "ash_b",
    "ash_p",
    "ash_s",
    "average_gradient",
    "cadref",
    "compose",
    "dice",
    "energy",
    "entropy",
    "exgrad",
    "fdbd",
    "feature_hessian",
    "feature_norm",
    "fisher_mahalanobis",
    "fisher_trace",
    "gaia_a",
    "gaia_z",
    "gaussian",
    "gen",
    "gini",
    "grad_uncertainty",
    "gradient_projection",
    "gradnorm",
    "gradnorm_pass",
    "gradorth",
    "gradpca",
    "gram",
    "grood",
    "gsc",
    "kl_matching",
    "knn",
    "layer_features",
    "layer_gradients",
    "layer_norms",
    "mahalanobis",
    "mahalanobis_layers",
    "mahalanobis_plus_plus",
    "max_logit",
    "msp",
    "nac",
    "nac_layers",
    "nci",
    "neco",
    "network_passes",
    "nnguide",
    "odin",
    "optfs",
    "parse_detectors",
    "pnml",
    "pro",
    "rankfeat",
    "react",
    "relative_mahalanobis",
    "relative_mahalanobis_plus_plus",
    "residual",
    "residual_norm",
    "scale",
    "scod",
    "she",
    "take_passes",
    "temperature_scaling",
    "vim",
    "vra",
    "weiper",
]
