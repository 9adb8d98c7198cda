"""Detector of the gradient space: GROOD."""

import functools
import pathlib
from typing import Literal

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.numerics import check_count
from gradnorm_jax.statistics.bank import SIZE, Bank, bank, bank_rows
from gradnorm_jax.statistics.class_moments import CLASS_SUMS, ClassSums
from gradnorm_jax.statistics.prototypes import grood_bank, prototypes, read_features
from gradnorm_jax.types import LinearHead, Model


@builder
def grood(*, foreign: Literal["mean"] | pathlib.Path = "mean", size: int = SIZE) -> Detector:
    """Distance between gradients with respect to a foreign prototype; see `scores.grood`.

    Args:
        foreign: what the foreign prototype is: the mean of the class means, or of the features
            `[N, D]` in a .npy file. The paper takes features of noise, which are the network's to
            make: `numpy.save("noise.npy", model(noise).features)`.
        size: how many training images to keep gradients of, at most; of these, the ones that are
            predicted as labelled.

    Raises:
        ValueError: an option is out of range, or the file cannot be read.
    """
    check_count("size", size)
    if foreign != "mean":
        read_features(foreign)
    return Detector("grood", "outputs", _grood, _fit(foreign, size))


@functools.cache
def _fit(foreign: Literal["mean"] | pathlib.Path, size: int) -> Fit:
    def finalize(head: LinearHead, sums: ClassSums, kept: Bank) -> scores.GroodBank:
        others = None if foreign == "mean" else read_features(foreign)
        return grood_bank(bank_rows(kept, size), prototypes(sums, others))

    return Fit((CLASS_SUMS, bank(size)), finalize)


def _grood(state: scores.GroodBank, model: Model, batch: Batch) -> jax.Array:
    return scores.grood(batch.outputs.features, state)
