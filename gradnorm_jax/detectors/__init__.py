"""Detectors: scores in the one shape that the evaluation gives to all of them.

A detector is a frozen value; see `Detector`. Adding one takes a pure function in
`gradnorm_jax.scores` and a row in `DETECTORS`; your own takes the function alone:

>>> mine = Detector("mine", "logits", lambda state, model, batch: batch.outputs.logits.max(axis=-1))
"""

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
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, Needs
from gradnorm_jax.detectors.feature import mahalanobis
from gradnorm_jax.detectors.gradient import feature_norm, gradnorm, residual_norm
from gradnorm_jax.detectors.gradient_subspace import average_gradient, gradorth, gradpca
from gradnorm_jax.detectors.grood import grood
from gradnorm_jax.detectors.neurons import gsc, nac
from gradnorm_jax.detectors.output import energy, msp, odin
from gradnorm_jax.detectors.parse import parse_detectors
from gradnorm_jax.detectors.table import DETECTORS

__all__ = [
    "DETECTORS",
    "Batch",
    "Detector",
    "Fit",
    "Needs",
    "average_gradient",
    "energy",
    "exgrad",
    "feature_hessian",
    "feature_norm",
    "fisher_mahalanobis",
    "fisher_trace",
    "gini",
    "grad_uncertainty",
    "gradnorm",
    "gradorth",
    "gradpca",
    "grood",
    "gsc",
    "mahalanobis",
    "msp",
    "nac",
    "odin",
    "parse_detectors",
    "pnml",
    "residual_norm",
    "scod",
]
