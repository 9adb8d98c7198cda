"""Detectors of the feature space that look up training images: KNN and NNGuide."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.numerics import check_count
from gradnorm_jax.statistics.bank import SIZE, Bank, bank, bank_rows
from gradnorm_jax.statistics.moments import unit
from gradnorm_jax.types import LinearHead, Model


class _Guides(NamedTuple):
    """Training features `[M, D]` of length one, and their energies `[M]`."""

    features: jax.Array
    energies: jax.Array


@builder
def knn(*, k: int = 50, bank_size: int = SIZE) -> Detector:
    """Distance to the k-th nearest training feature; see `scores.knn`.

    Args:
        k: which neighbour. 50 is the paper's for CIFAR-10, whose 50,000 images are all in the bank,
            and OpenOOD's; the paper's for the whole of ImageNet, 1000, is as large a share of 1.28
            million as 39 is of the default bank.
        bank_size: how many training images are kept; see `statistics.bank` for what they take.

    Raises:
        ValueError: an option is out of range.
    """
    _check(k, bank_size)
    return Detector("knn", "outputs", _knn, _bank_fit(k, bank_size), {"k": k})


@builder
def nnguide(*, k: int = 10, bank_size: int = SIZE) -> Detector:
    """Energy, guided by the training features most alike; see `scores.nnguide`.

    The authors draw 1 % of ImageNet, 12,812 images, at random, and OpenOOD takes the first 1 % of
    the training data in their order; here the bank is drawn by position and is the one of `knn`.

    Args:
        k: how many neighbours; the paper's for ImageNet. OpenOOD takes 100.
        bank_size: how many training images are kept; see `statistics.bank` for what they take.

    Raises:
        ValueError: an option is out of range.
    """
    _check(k, bank_size)
    return Detector("nnguide", "outputs", _nnguide, _bank_fit(k, bank_size), {"k": k})


def _check(k: int, bank_size: int) -> None:
    check_count("k", k)
    if bank_size < k:
        raise ValueError(f"k={k} neighbours need a bank of as many images, got {bank_size}")


@functools.cache
def _bank_fit(k: int, bank_size: int) -> Fit:
    def finalize(head: LinearHead, value: Bank) -> _Guides:
        rows = bank_rows(value, bank_size)
        if (kept := len(rows.keys)) < k:
            raise ValueError(f"k={k} neighbours need as many training images, got {kept}: lower k")
        return _Guides(jnp.asarray(unit(rows.features)), jnp.asarray(rows.energies))

    return Fit((bank(bank_size),), finalize)


def _knn(state: _Guides, model: Model, batch: Batch, *, k: int) -> jax.Array:
    return scores.knn(batch.outputs.features, state.features, k=k)


def _nnguide(state: _Guides, model: Model, batch: Batch, *, k: int) -> jax.Array:
    return scores.nnguide(*batch.outputs, *state, k=k)
