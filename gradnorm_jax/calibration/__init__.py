"""Decisions from scores: thresholds, p-values and tests whose error rates are guaranteed.

Pure functions of arrays are here, a detector that is calibrated with them is what
`gradnorm_jax.calibrate` returns.
"""

from gradnorm_jax.calibration.conformal import (
    benjamini_hochberg,
    conformal_p_values,
    threshold_at_tpr,
    tpr_interval,
)
from gradnorm_jax.calibration.drift import Drift, DriftState, init_drift, update_drift
from gradnorm_jax.calibration.martingale import Martingale, init_martingale, update_martingale

__all__ = [
    "Drift",
    "DriftState",
    "Martingale",
    "benjamini_hochberg",
    "conformal_p_values",
    "init_drift",
    "init_martingale",
    "threshold_at_tpr",
    "tpr_interval",
    "update_drift",
    "update_martingale",
]
