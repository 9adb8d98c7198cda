"""Detectors of the feature space that look at the predicted class: SHE, fDBD, NCI, CADRef."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.statistics.class_moments import (
    CORRECT_CLASS_SUMS,
    PREDICTED_CLASS_SUMS,
    ClassSums,
    class_means,
)
from gradnorm_jax.statistics.moments import merge_sums
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead, Model, linear_head

LogitScore = Literal["energy", "gen", "max_logit", "msp"]


class _Cadref(NamedTuple):
    means: jax.Array
    mean_logit_score: jax.Array


class _ScoreSum(NamedTuple):
    """A logit score, counted and summed over images."""

    num_images: np.ndarray
    total: np.ndarray


@builder
def she() -> Detector:
    """Inner product with the predicted class's mean feature; see `scores.she`.

    A class of which no training image is classified correctly has a pattern of zeros, and so the
    score of no resemblance, where OpenOOD gives NaN.
    """
    return Detector("she", "outputs", _she, Fit((CORRECT_CLASS_SUMS,), _patterns))


@builder
def fdbd() -> Detector:
    """Distance to decision boundaries; see `scores.fdbd`."""
    return Detector("fdbd", "outputs", _fdbd, _MEAN)


@builder
def nci(*, alpha: float = 1e-4) -> Detector:
    """Closeness to the predicted class's weights; see `scores.nci`.

    Args:
        alpha: weight of the feature's size, at least zero; OpenOOD's. The paper chooses it on
            validation data, from 1e-4 to 0.1.

    Raises:
        ValueError: an option is out of range.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    return Detector("nci", "outputs", _nci, _MEAN, {"alpha": alpha})


@builder
def cadref(*, logit_score: LogitScore = "energy") -> Detector:
    """Relative distance from the predicted class's mean feature; see `scores.cadref`.

    A class that is never predicted in training takes the mean of all features.

    Args:
        logit_score: the score of the logits that it is weighed with, which should be positive; in
            "gen" the inverse of the generalised entropy, of a tenth of the classes.
    """
    options = {"logit_score": logit_score}
    return Detector("cadref", "outputs", _cadref, _cadref_fit(logit_score), options)


def _class_rows(sums: ClassSums, otherwise: np.ndarray) -> jax.Array:
    """The mean feature of every class `[C, D]`, and `otherwise` for those without images."""
    present = sums.counts > 0
    means = np.broadcast_to(otherwise, sums.sums.shape).copy()
    means[present] = class_means(sums)
    return jnp.asarray(means)


def _patterns(head: LinearHead, sums: ClassSums) -> jax.Array:
    if not sums.counts.any():
        raise ValueError(
            "none of the training images is predicted as labelled, so there are no patterns: give "
            "labels that are numbered like the network's classes"
        )
    return _class_rows(sums, np.zeros(()))


def _mean(head: LinearHead, sums: ClassSums) -> jax.Array:
    # Of all images, whatever class they are predicted as; without the products of moments.
    class_means(sums)
    return jnp.asarray(sums.sums.sum(axis=0) / sums.counts.sum())


_MEAN = Fit((PREDICTED_CLASS_SUMS,), _mean)


def _inverse_gen(logits: jax.Array) -> jax.Array:
    top = max(10, logits.shape[1] // 10)
    entropy = -scores.gen(logits, top=top)
    return 1 / jnp.maximum(entropy, jnp.finfo(entropy.dtype).tiny)


_LOGIT_SCORES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "energy": scores.energy,
    "gen": _inverse_gen,
    "max_logit": scores.max_logit,
    "msp": scores.msp,
}
assert set(_LOGIT_SCORES) == set(get_args(LogitScore))


@functools.cache
def _cadref_fit(logit_score: str) -> Fit:
    score = _LOGIT_SCORES[logit_score]

    def init(head: LinearHead) -> _ScoreSum:
        return _ScoreSum(np.zeros(()), np.zeros(()))

    def update(value: _ScoreSum, examples: Examples) -> _ScoreSum:
        found = np.asarray(score(jnp.asarray(examples.logits)), np.float64)
        return merge_sums(value, _ScoreSum(np.array(len(found)), found.sum()))

    def finalize(head: LinearHead, sums: ClassSums, total: _ScoreSum) -> _Cadref:
        mean = np.asarray(_mean(head, sums))
        return _Cadref(_class_rows(sums, mean), jnp.asarray(total.total / total.num_images))

    statistic = Statistic(f"mean {logit_score}", init, update, merge_sums)
    return Fit((PREDICTED_CLASS_SUMS, statistic), finalize)


def _she(state: jax.Array, model: Model, batch: Batch) -> jax.Array:
    return scores.she(*batch.outputs, state)


def _fdbd(state: jax.Array, model: Model, batch: Batch) -> jax.Array:
    return scores.fdbd(*batch.outputs, linear_head(model).kernel, state)


def _nci(state: jax.Array, model: Model, batch: Batch, *, alpha: float) -> jax.Array:
    return scores.nci(*batch.outputs, linear_head(model).kernel, state, alpha=alpha)


def _cadref(state: _Cadref, model: Model, batch: Batch, *, logit_score: str) -> jax.Array:
    found = _LOGIT_SCORES[logit_score](batch.outputs.logits)
    return scores.cadref(
        *batch.outputs, linear_head(model).kernel, state.means, found, state.mean_logit_score
    )
