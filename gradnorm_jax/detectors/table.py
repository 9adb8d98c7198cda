"""The table of all detectors, by the name that a spec gives them."""

from collections.abc import Callable, Mapping

from gradnorm_jax.detectors.detector import Detector
from gradnorm_jax.detectors.feature import mahalanobis
from gradnorm_jax.detectors.gradient import gradnorm
from gradnorm_jax.detectors.output import energy, msp, odin

DETECTORS: Mapping[str, Callable[..., Detector]] = {
    "msp": msp,
    "odin": odin,
    "mahalanobis": mahalanobis,
    "energy": energy,
    "gradnorm": gradnorm,
}
