"""Pure score functions; in all of them higher means more in-distribution."""

from gradnorm_jax.scores.curvature import (
    exgrad,
    feature_hessian_trace,
    fisher_trace,
    gini,
    grad_uncertainty,
)
from gradnorm_jax.scores.feature import TiedGaussians, mahalanobis
from gradnorm_jax.scores.gradient import (
    feature_norm,
    gradnorm,
    gradnorm_by_autodiff,
    gradnorm_of_parameters,
    one_hot_prediction,
    residual_norm,
    smoothed_prediction,
)
from gradnorm_jax.scores.gradient_subspace import (
    AverageGradients,
    CellSubspace,
    Subspace,
    average_gradient,
    gradorth,
    gradpca,
    gradpca_max,
)
from gradnorm_jax.scores.grood import GroodBank, Prototypes, grood, prototype_gradient
from gradnorm_jax.scores.neurons import NeuronCoverage, gsc, nac
from gradnorm_jax.scores.output import energy, msp, odin
from gradnorm_jax.scores.posterior import HeadFisher, Leverage, fisher_mahalanobis, pnml, scod

__all__ = [
    "AverageGradients",
    "CellSubspace",
    "GroodBank",
    "HeadFisher",
    "Leverage",
    "NeuronCoverage",
    "Prototypes",
    "Subspace",
    "TiedGaussians",
    "average_gradient",
    "energy",
    "exgrad",
    "feature_hessian_trace",
    "feature_norm",
    "fisher_mahalanobis",
    "fisher_trace",
    "gini",
    "grad_uncertainty",
    "gradnorm",
    "gradnorm_by_autodiff",
    "gradnorm_of_parameters",
    "gradorth",
    "gradpca",
    "gradpca_max",
    "grood",
    "gsc",
    "mahalanobis",
    "msp",
    "nac",
    "odin",
    "one_hot_prediction",
    "pnml",
    "prototype_gradient",
    "residual_norm",
    "scod",
    "smoothed_prediction",
]
