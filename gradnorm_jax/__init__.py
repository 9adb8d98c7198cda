"""Gradient-space out-of-distribution detection in JAX.

The functional core needs only JAX and NumPy. `from_linen` and `from_nnx` import Flax when they are
first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gradnorm_jax.detectors import DETECTORS, Batch, Detector, Fit, parse_detectors
from gradnorm_jax.losses import cross_entropy, kl_to_uniform, softmax_minus_uniform
from gradnorm_jax.norms import combine_norms, entrywise_norm
from gradnorm_jax.per_example import (
    per_example_grad_norms,
    per_example_grads,
    per_example_reduce,
)
from gradnorm_jax.scores import (
    class_moments,
    energy,
    feature_norm,
    gradnorm,
    gradnorm_by_autodiff,
    gradnorm_of_parameters,
    mahalanobis,
    msp,
    odin,
    one_hot_prediction,
    residual_norm,
    smoothed_prediction,
    tied_gaussians,
)
from gradnorm_jax.types import Head, Model, Outputs, head_parameters

if TYPE_CHECKING:
    from gradnorm_jax.adapters.apply import from_apply
    from gradnorm_jax.adapters.linen import from_linen
    from gradnorm_jax.adapters.nnx import from_nnx

_LAZY = {
    "from_apply": "gradnorm_jax.adapters.apply",
    "from_linen": "gradnorm_jax.adapters.linen",
    "from_nnx": "gradnorm_jax.adapters.nnx",
}

__all__ = [
    "DETECTORS",
    "Batch",
    "Detector",
    "Fit",
    "Head",
    "Model",
    "Outputs",
    "class_moments",
    "combine_norms",
    "cross_entropy",
    "energy",
    "entrywise_norm",
    "feature_norm",
    "from_apply",
    "from_linen",
    "from_nnx",
    "gradnorm",
    "gradnorm_by_autodiff",
    "gradnorm_of_parameters",
    "head_parameters",
    "kl_to_uniform",
    "mahalanobis",
    "msp",
    "odin",
    "one_hot_prediction",
    "parse_detectors",
    "per_example_grad_norms",
    "per_example_grads",
    "per_example_reduce",
    "residual_norm",
    "smoothed_prediction",
    "softmax_minus_uniform",
    "tied_gaussians",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
