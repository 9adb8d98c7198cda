"""Detectors of the gradient space: derivatives of the likelihood, and posteriors made of them."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, images_of
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.numerics import check_count, check_temperature
from gradnorm_jax.statistics.directions import posterior_root, unit_leverage
from gradnorm_jax.statistics.moments import MOMENTS, UNIT_MOMENTS, Moments
from gradnorm_jax.statistics.output_fisher import OUTPUT_FISHER, OutputFisher, head_fisher
from gradnorm_jax.statistics.readings import Read, of_reading
from gradnorm_jax.types import LinearHead, Model, linear_head


@builder
def exgrad(*, sign: Literal[1, -1], temperature: float = 1.0) -> Detector:
    """Expected norm of the log likelihood's gradient; see `scores.exgrad`.

    Args:
        sign: 1 if larger norms shall mean more in-distribution, -1 if smaller ones; there is no
            default, as the paper gives none.
        temperature: T > 0 of the softmax.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    return Detector(
        "exgrad", "outputs", _exgrad, options={"sign": sign, "temperature": temperature}
    )


@builder
def gini(*, temperature: float = 1.0) -> Detector:
    """Negative Gini impurity of the softmax, a factor of ExGrad; see `scores.gini`.

    Args:
        temperature: T > 0 of the softmax.

    Raises:
        ValueError: an option is out of range.
    """
    check_temperature(temperature)
    return Detector("gini", "logits", _gini, options={"temperature": temperature})


@builder
def fisher_trace() -> Detector:
    """Negative trace of the last layer's Fisher information; see `scores.fisher_trace`."""
    return Detector("fisher_trace", "outputs", _fisher_trace)


@builder
def grad_uncertainty() -> Detector:
    """Squared gradient for a label that confounds all classes; see `scores.grad_uncertainty`."""
    return Detector("grad_uncertainty", "outputs", _grad_uncertainty)


@builder
def feature_hessian() -> Detector:
    """Negative trace of the loss's Hessian by features; see `scores.feature_hessian_trace`."""
    return Detector("feature_hessian", "logits", _feature_hessian)


@builder
def fisher_mahalanobis(*, damping: float = 1e-3, include_bias: bool = True) -> Detector:
    """Length of the gradient in a Fisher metric; see `scores.fisher_mahalanobis`.

    Learns two matrices, `[D + 1, D + 1]` and `[C, C]`, and takes their eigenvectors: for 21,843
    classes the second has 4 GB, and hours to go.

    Args:
        damping: what is added to their diagonals, in units of their mean eigenvalues.
        include_bias: of the gradients of kernel and bias together.

    Raises:
        ValueError: an option is out of range.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping!r}")
    fit = _fisher_fit(damping, include_bias)
    return Detector("fisher_mahalanobis", "outputs", _fisher_mahalanobis, fit)


@builder
def scod(
    *,
    rank: int | None = None,
    prior_std: float = 1.0,
    include_bias: bool = True,
    select: str | Sequence[str] | None = None,
    directions: int | None = None,
    probes: int | None = None,
    seed: int = 0,
) -> Detector:
    """Variance of the logits under a posterior of the last layer; see `scores.scod`.

    With `select` it is that of other parameters, `scores.scod_of_parameters`, exact unless told
    otherwise: it learns a square matrix of their number, and costs about three forward passes a
    class. With many parameters take `directions`, with many classes these or `probes`.

    Args:
        rank: of how many directions the training data count, features in the last layer; None for
            all.
        prior_std: standard deviation of each weight before data.
        include_bias: of the weights of the last layer's kernel and bias together.
        select: which parameters: a path pattern or several; the last layer's, in closed form, by
            default.
        directions: random ones, along which parameters move, in place of all: two forward passes
            each, however many classes there are.
        probes: random sums of logits in place of the logits (Hutchinson's estimator): three forward
            passes each. With `directions` they save only memory.
        seed: of what is random.

    Raises:
        ValueError: an option is out of range, or does not go with the last layer.
    """
    if rank is not None and rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    if not prior_std > 0:
        raise ValueError(f"prior_std must be positive, got {prior_std!r}")
    sketch = {"directions": directions, "probes": probes}
    for name, number in sketch.items():
        if number is not None:
            check_count(name, number)
            if select is None:
                raise ValueError(
                    f"{name} are for other parameters than the last layer's, which are exact: "
                    "give select"
                )
    if select is not None:
        options = {"select": select, "seed": seed} | sketch
        fit = _parameters_fit(tuple(options.items()), rank, prior_std)
        return Detector("scod", "network", _scod_of_parameters, fit, options)
    return Detector("scod", "outputs", _scod, _scod_fit(rank, prior_std, include_bias))


@builder
def pnml() -> Detector:
    """Regret of predictive normalised maximum likelihood; see `scores.pnml`."""
    return Detector("pnml", "outputs", _pnml, _PNML)


def _has_bias(model: Model) -> bool:
    return model.head is not None and model.head.bias is not None


def _exgrad(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.exgrad(*batch.outputs, include_bias=_has_bias(model), **options)


def _gini(state: None, model: Model, batch: Batch, *, temperature: float) -> jax.Array:
    return scores.gini(batch.outputs.logits, temperature=temperature)


def _fisher_trace(state: None, model: Model, batch: Batch) -> jax.Array:
    return scores.fisher_trace(*batch.outputs, include_bias=_has_bias(model))


def _grad_uncertainty(state: None, model: Model, batch: Batch) -> jax.Array:
    return scores.grad_uncertainty(*batch.outputs, include_bias=_has_bias(model))


def _feature_hessian(state: None, model: Model, batch: Batch) -> jax.Array:
    return scores.feature_hessian_trace(batch.outputs.logits, linear_head(model).kernel)


@functools.cache
def _fisher_fit(damping: float, include_bias: bool) -> Fit:
    def finalize(head: LinearHead, moments: Moments, output: OutputFisher) -> scores.HeadFisher:
        return head_fisher(moments, output, damping=damping, include_bias=include_bias)

    return Fit((MOMENTS, OUTPUT_FISHER), finalize)


def _fisher_mahalanobis(state: scores.HeadFisher, model: Model, batch: Batch) -> jax.Array:
    return scores.fisher_mahalanobis(*batch.outputs, state)


@functools.cache
def _scod_fit(rank: int | None, prior_std: float, include_bias: bool) -> Fit:
    def finalize(head: LinearHead, moments: Moments) -> jax.Array:
        return posterior_root(
            moments, len(head.bias), rank=rank, prior_std=prior_std, include_bias=include_bias
        )

    return Fit((MOMENTS,), finalize)


@functools.cache
def _parameters_fit(
    options: tuple[tuple[str, Any], ...], rank: int | None, prior_std: float
) -> Fit:
    reading = Reading(f"logit_derivatives({dict(options)})", _logit_derivatives, options=options)

    def finalize(head: LinearHead, found: Read) -> jax.Array:
        return posterior_root(found.value, 1, rank=rank, prior_std=prior_std, include_bias=False)

    return Fit((of_reading(MOMENTS, reading),), finalize)


def _logit_derivatives(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.logit_derivatives(model, images_of(batch), **options)


def _scod_of_parameters(state: jax.Array, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.scod_of_parameters(model, images_of(batch), state, **options)


def _scod(state: jax.Array, model: Model, batch: Batch) -> jax.Array:
    return scores.scod(batch.outputs.features, state)


def _leverage(head: LinearHead, moments: Moments) -> scores.Leverage:
    return unit_leverage(moments)


_PNML = Fit((UNIT_MOMENTS,), _leverage)


def _pnml(state: scores.Leverage, model: Model, batch: Batch) -> jax.Array:
    return scores.pnml(batch.outputs.features, *linear_head(model), state)
