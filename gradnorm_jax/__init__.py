"""Gradient-space out-of-distribution detection in JAX.

The functional core needs only JAX and NumPy. Everything is imported when it is first asked for, so
that a command can take signals before that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradnorm_jax import calibration, detectors, metrics, models, plots, scores, statistics
    from gradnorm_jax.adapters.apply import from_apply
    from gradnorm_jax.adapters.linen import from_linen
    from gradnorm_jax.adapters.nnx import from_nnx
    from gradnorm_jax.calibration import benjamini_hochberg, conformal_p_values
    from gradnorm_jax.calibration.calibrated import Calibrated, Decision, calibrate
    from gradnorm_jax.calibration.detector_file import load_detector, save_detector
    from gradnorm_jax.calibration.export import export_detector
    from gradnorm_jax.data import array_stream, as_stream, batch_stream
    from gradnorm_jax.data.preprocess import Preprocess
    from gradnorm_jax.detectors import (
        DETECTORS,
        Batch,
        Detector,
        Fit,
        NetworkPass,
        Reading,
        Rectifier,
        compose,
        parse_detectors,
    )
    from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
    from gradnorm_jax.evaluation.records import Interrupted, Unfinished
    from gradnorm_jax.evaluation.result import Result
    from gradnorm_jax.fitted import Fitted, fit
    from gradnorm_jax.losses import cross_entropy, kl_to_uniform, softmax_minus_uniform
    from gradnorm_jax.norms import combine_norms, entrywise_norm
    from gradnorm_jax.per_example import (
        Tap,
        edited,
        gradient_gram,
        per_example_grad_norms,
        per_example_grads,
        per_example_reduce,
        squared_gradient_sums,
        taps,
    )
    from gradnorm_jax.reporting import report
    from gradnorm_jax.scores import (
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
    )
    from gradnorm_jax.statistics import Examples, Statistic, tied_gaussians
    from gradnorm_jax.tuning import Trial, Tuned, tune
    from gradnorm_jax.types import Head, LinearHead, Model, Outputs, Variables, head_parameters

_SUBMODULES = ("calibration", "detectors", "metrics", "models", "plots", "scores", "statistics")
_LAZY = {
    "Batch": "detectors",
    "Calibrated": "calibration.calibrated",
    "DETECTORS": "detectors",
    "Decision": "calibration.calibrated",
    "Detector": "detectors",
    "Examples": "statistics",
    "Fit": "detectors",
    "Fitted": "fitted",
    "Head": "types",
    "Interrupted": "evaluation.records",
    "LinearHead": "types",
    "Model": "types",
    "NetworkPass": "detectors",
    "Outputs": "types",
    "Preprocess": "data.preprocess",
    "Reading": "detectors",
    "Rectifier": "detectors",
    "Result": "evaluation.result",
    "Statistic": "statistics",
    "Tap": "per_example",
    "Trial": "tuning",
    "Tuned": "tuning",
    "Unfinished": "evaluation.records",
    "Variables": "types",
    "array_stream": "data",
    "as_stream": "data",
    "batch_stream": "data",
    "benjamini_hochberg": "calibration",
    "calibrate": "calibration.calibrated",
    "combine_norms": "norms",
    "compose": "detectors",
    "conformal_p_values": "calibration",
    "cross_entropy": "losses",
    "edited": "per_example",
    "energy": "scores",
    "entrywise_norm": "norms",
    "evaluate": "evaluation.evaluate",
    "evaluate_cache": "evaluation.evaluate",
    "export_detector": "calibration.export",
    "feature_norm": "scores",
    "fit": "fitted",
    "from_apply": "adapters.apply",
    "from_linen": "adapters.linen",
    "from_nnx": "adapters.nnx",
    "gradient_gram": "per_example",
    "gradnorm": "scores",
    "gradnorm_by_autodiff": "scores",
    "gradnorm_of_parameters": "scores",
    "head_parameters": "types",
    "kl_to_uniform": "losses",
    "load_detector": "calibration.detector_file",
    "mahalanobis": "scores",
    "msp": "scores",
    "odin": "scores",
    "one_hot_prediction": "scores",
    "parse_detectors": "detectors",
    "per_example_grad_norms": "per_example",
    "per_example_grads": "per_example",
    "per_example_reduce": "per_example",
    "report": "reporting",
    "residual_norm": "scores",
    "save_detector": "calibration.detector_file",
    "smoothed_prediction": "scores",
    "softmax_minus_uniform": "losses",
    "squared_gradient_sums": "per_example",
    "taps": "per_example",
    "tied_gaussians": "statistics",
    "tune": "tuning",
}
"""Where each public name is."""

__version__ = "0.1.0"

__all__ = [
    "DETECTORS",
    "Batch",
    "Calibrated",
    "Decision",
    "Detector",
    "Examples",
    "Fit",
    "Fitted",
    "Head",
    "Interrupted",
    "LinearHead",
    "Model",
    "NetworkPass",
    "Outputs",
    "Preprocess",
    "Reading",
    "Rectifier",
    "Result",
    "Statistic",
    "Tap",
    "Trial",
    "Tuned",
    "Unfinished",
    "Variables",
    "__version__",
    "array_stream",
    "as_stream",
    "batch_stream",
    "benjamini_hochberg",
    "calibrate",
    "calibration",
    "combine_norms",
    "compose",
    "conformal_p_values",
    "cross_entropy",
    "detectors",
    "edited",
    "energy",
    "entrywise_norm",
    "evaluate",
    "evaluate_cache",
    "export_detector",
    "feature_norm",
    "fit",
    "from_apply",
    "from_linen",
    "from_nnx",
    "gradient_gram",
    "gradnorm",
    "gradnorm_by_autodiff",
    "gradnorm_of_parameters",
    "head_parameters",
    "kl_to_uniform",
    "load_detector",
    "mahalanobis",
    "metrics",
    "models",
    "msp",
    "odin",
    "one_hot_prediction",
    "parse_detectors",
    "per_example_grad_norms",
    "per_example_grads",
    "per_example_reduce",
    "plots",
    "report",
    "residual_norm",
    "save_detector",
    "scores",
    "smoothed_prediction",
    "softmax_minus_uniform",
    "squared_gradient_sums",
    "statistics",
    "taps",
    "tied_gaussians",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"gradnorm_jax.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"gradnorm_jax.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
