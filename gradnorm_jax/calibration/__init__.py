"""Decisions from scores: thresholds and p-values whose error rates are guaranteed.

Pure functions of arrays are here, a detector that is calibrated with them is what
`gradnorm_jax.calibrate` returns.
"""

from gradnorm_jax.calibration.conformal import (
    benjamini_hochberg,
    conformal_p_values,
    threshold_at_tpr,
    tpr_interval,
)

__all__ = ["benjamini_hochberg", "conformal_p_values", "threshold_at_tpr", "tpr_interval"]
