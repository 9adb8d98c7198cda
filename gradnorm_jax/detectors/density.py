"""WeiPer: a detector of densities in the feature space."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.numerics import check_count
from gradnorm_jax.scores import Densities, Perturbation
from gradnorm_jax.statistics.densities import DensitySums, density_sums, mean_densities
from gradnorm_jax.types import LinearHead, Model, linear_head

_PRESETS: dict[str, dict[str, float]] = {
    "imagenet": {"distance": 2.4, "lambda_2": 0.25, "smoothing": 40},
    "cifar": {"distance": 1.8, "lambda_2": 0.1, "smoothing": 4},
}


@builder
def weiper(
    *,
    preset: Literal["imagenet", "cifar"] = "imagenet",
    repeats: int = 100,
    distance: float | None = None,
    seed: int = 0,
    bins: int = 100,
    lambda_1: float = 2.5,
    lambda_2: float | None = None,
    smoothing: int | None = None,
    smoothing_perturbed: int = 15,
) -> Detector:
    """WeiPer+KLD; see `scores.weiper`. The densities are learned in a second pass.

    It multiplies by the last layer `repeats` times for each image.

    Args:
        preset: the authors' choice (their README) for a ResNet-50 on ImageNet, distance 2.4,
            lambda_2 0.25, smoothing 40, or for a ResNet-18 on CIFAR-10, 1.8, 0.1, 4.
        repeats: how many times the last layer is perturbed.
        distance: how far, as a multiple of the length of each class's weights.
        seed: of the directions.
        bins: of the densities.
        lambda_1: weight of the perturbed logits' divergence.
        lambda_2: weight of their confidence.
        smoothing: width of the moving average, in bins.
        smoothing_perturbed: that for perturbed logits.

    Raises:
        ValueError: an option is out of range.
    """
    chosen = _PRESETS[preset]
    width = int(chosen["smoothing"]) if smoothing is None else smoothing
    counts = {"repeats": repeats, "bins": bins, "smoothing": width}
    for name, value in (counts | {"smoothing_perturbed": smoothing_perturbed}).items():
        check_count(name, value)
    perturbation = Perturbation(repeats, chosen["distance"] if distance is None else distance, seed)
    options = {
        **perturbation._asdict(),
        "lambda_1": lambda_1,
        "lambda_2": chosen["lambda_2"] if lambda_2 is None else lambda_2,
        "smoothing": width,
        "smoothing_perturbed": smoothing_perturbed,
    }
    return Detector("weiper", "outputs", _weiper, _densities_fit(perturbation, bins), options)


@functools.cache
def _densities_fit(perturbation: Perturbation, bins: int) -> Fit:
    return Fit((density_sums(perturbation, bins),), _densities)


def _densities(head: LinearHead, value: DensitySums) -> Densities:
    return jax.tree.map(jnp.asarray, mean_densities(value))


def _weiper(
    state: Densities,
    model: Model,
    batch: Batch,
    *,
    repeats: int,
    distance: float,
    seed: int,
    **options: Any,
) -> jax.Array:
    return scores.weiper(
        batch.outputs.features,
        *linear_head(model),
        state,
        perturbation=Perturbation(repeats, distance, seed),
        **options,
    )
