"""Detectors of the gradient space that go feature by feature: NAC and gradient short-circuits."""

import functools

import jax

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.statistics.neuron_counts import NeuronCounts, neuron_counts, neuron_coverage
from gradnorm_jax.types import LinearHead, Model, linear_head


@builder
def nac(*, bins: int = 50, steepness: float = 3000.0, usual: float = 0.01) -> Detector:
    """Neuron activation coverage of the last layer's input; see `scores.nac`.

    Args:
        bins: M, for how many edges of bins, the paper's M; rounded down to an even number.
        steepness: alpha of the sigmoid, > 0.
        usual: the fraction of training images whose being in a state makes it usual. The paper
            counts images instead: 10 of the 1,000 that it takes.

    Raises:
        ValueError: an option is out of range.
    """
    if bins < 4:
        raise ValueError(f"bins must be at least 4, got {bins}")
    if not steepness > 0:
        raise ValueError(f"steepness must be positive, got {steepness!r}")
    if not 0 < usual <= 1:
        raise ValueError(f"usual must lie in (0, 1], got {usual!r}")
    return Detector("nac", "outputs", _nac, _nac_fit(bins, steepness, usual))


@builder
def gsc(*, fraction: float = 0.05) -> Detector:
    """Energy without the features that decide most, experimental; see `scores.gsc`.

    Args:
        fraction: of the features to take out, in [0, 1].

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction!r}")
    return Detector("gsc", "outputs", _gsc, options={"fraction": fraction})


@functools.cache
def _nac_fit(bins: int, steepness: float, usual: float) -> Fit:
    def finalize(head: LinearHead, counts: NeuronCounts) -> scores.NeuronCoverage:
        return neuron_coverage(counts, usual)

    return Fit((neuron_counts(bins, steepness),), finalize)


def _nac(state: scores.NeuronCoverage, model: Model, batch: Batch) -> jax.Array:
    return scores.nac(*batch.outputs, linear_head(model).kernel, state)


def _gsc(state: None, model: Model, batch: Batch, *, fraction: float) -> jax.Array:
    return scores.gsc(*batch.outputs, linear_head(model).kernel, fraction=fraction)
