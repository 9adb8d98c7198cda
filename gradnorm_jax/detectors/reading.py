"""Readings: rows that are read inside the network, for detectors that look at features."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gradnorm_jax.detectors.detector import Batch, Detector, Fit, freeze_options
from gradnorm_jax.statistics.readings import of_reading
from gradnorm_jax.types import LinearHead, Model


@dataclasses.dataclass(frozen=True)
class Reading:
    """Something that is read inside the network, a row for each image.

    A detector that looks at features works on it as well: `compose(reading, knn())`. On its own it
    stands for itself with `gaussian`. Like a detector it is a value.

    Attributes:
        name: what tables and files call it; it must tell its options.
        read_fn: pure function `(state, model, batch, **options) -> [B, K]`; `state` is None unless
            there is a fit.
        fit: how the state is learned; None if there is none.
        options: keyword arguments of `read_fn`, as in `Detector`.

    >>> def mean_pixel(state, model, batch):
    ...     return batch.images.mean(axis=(1, 2))
    >>> detector = compose(Reading("mean_pixel", mean_pixel), detectors.knn())
    """

    name: str
    read_fn: Callable[..., jax.Array]
    fit: Fit | None = None
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", freeze_options(self.name, self.options))

    def __call__(self, state: Any, model: Model, batch: Batch) -> jax.Array:
        """The rows `[B, K]` of a batch."""
        return self.read_fn(state, model, batch, **dict(self.options))


def compose_reading(reading: Reading, detector: Detector) -> Detector:
    """The detector of what is read in place of features, fitted to such if it is fitted.

    Raises:
        ValueError: the detector does not look at features.
    """
    if detector.needs != "outputs":
        raise ValueError(
            f"{detector.name} does not look at features, whose place {reading.name} takes: write "
            f"{reading.name}+knn, say"
        )
    return Detector(
        f"{reading.name}+{detector.name}",
        "network",
        _score,
        _fit(reading, detector.fit),
        {"reading": reading, "detector": detector},
    )


def _score(
    state: tuple[Any, Any] | None,
    model: Model,
    batch: Batch,
    *,
    reading: Reading,
    detector: Detector,
) -> jax.Array:
    own, inner = state or (None, None)
    rows = reading(own, model, batch)
    return detector.score(inner, model, Batch(None, batch.outputs._replace(features=rows)))


@functools.cache
def _fit(reading: Reading, fit: Fit | None) -> Fit | None:
    """What both learn, the detector of rows."""
    own = reading.fit
    if own is None and fit is None:
        return None
    before = () if own is None else own.statistics
    inner = () if fit is None else tuple(of_reading(s, reading) for s in fit.statistics)

    def finalize(head: LinearHead, *values: Any) -> tuple[Any, Any]:
        state = None if own is None else own.finalize(head, *values[: len(before)])
        if fit is None:
            return state, None
        return state, fit.finalize(head, *(v.value for v in values[len(before) :]))

    return Fit((*before, *inner), finalize)
