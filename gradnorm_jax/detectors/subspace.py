"""Detectors of the feature space that split it in two: ViM, Residual, NECO."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.scores import Principal, Residual
from gradnorm_jax.statistics.moments import MOMENTS, Moments
from gradnorm_jax.statistics.subspaces import (
    VirtualLogits,
    principal_space,
    residual_space,
    virtual_logit_scale,
    virtual_logits,
)
from gradnorm_jax.types import LinearHead, Model


class _Vim(NamedTuple):
    space: Residual
    alpha: jax.Array


@builder
def residual(*, dim: int | None = None) -> Detector:
    """Length of the part in the residual space; see `scores.residual`.

    Args:
        dim: how many directions are not residual; by default the paper's, 1000 of at least 2048,
            512 of at least 768, and half of fewer.
    """
    return Detector("residual", "outputs", _residual, _residual_fit(dim))


@builder
def vim(*, dim: int | None = None) -> Detector:
    """Energy minus the residual, scaled like a logit; see `scores.vim`.

    The scale is learned in a second pass over the training data.

    Args:
        dim: as in `residual`.
    """
    return Detector("vim", "outputs", _vim, _vim_fit(dim))


@builder
def neco(*, dim: int | None = None, use_max_logit: bool = False) -> Detector:
    """The share of a feature in the principal space; see `scores.neco`.

    Args:
        dim: of the principal space; by default as many directions as hold 90 % of the variance.
        use_max_logit: multiply by the largest logit, as the paper does for all but ResNets.
    """
    options = {"use_max_logit": use_max_logit}
    return Detector("neco", "outputs", _neco, _neco_fit(dim), options)


@functools.cache
def _residual_fit(dim: int | None) -> Fit:
    def finalize(head: LinearHead, moments: Moments) -> Residual:
        return jax.tree.map(jnp.asarray, residual_space(moments, head, dim))

    return Fit((MOMENTS,), finalize)


@functools.cache
def _vim_fit(dim: int | None) -> Fit:
    return Fit((virtual_logits(dim),), _vim_state)


@functools.cache
def _neco_fit(dim: int | None) -> Fit:
    def finalize(head: LinearHead, moments: Moments) -> Principal:
        return jax.tree.map(jnp.asarray, principal_space(moments, dim))

    return Fit((MOMENTS,), finalize)


def _vim_state(head: LinearHead, value: VirtualLogits) -> _Vim:
    space = jax.tree.map(jnp.asarray, value.space)
    return _Vim(space, jnp.asarray(virtual_logit_scale(value)))


def _residual(state: Residual, model: Model, batch: Batch) -> jax.Array:
    return scores.residual(batch.outputs.features, state)


def _vim(state: _Vim, model: Model, batch: Batch) -> jax.Array:
    return scores.vim(*batch.outputs, *state)


def _neco(state: Principal, model: Model, batch: Batch, *, use_max_logit: bool) -> jax.Array:
    return scores.neco(*batch.outputs, state, use_max_logit=use_max_logit)
