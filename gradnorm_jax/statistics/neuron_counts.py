"""How often each feature was in each state, for neuron activation coverage."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.neurons import NeuronCoverage
from gradnorm_jax.statistics.softmax import softmax
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead

_BASE = 1000.0


class NeuronCounts(NamedTuple):
    """Counts of the states of features.

    Attributes:
        kernel: `[D, C]`, the last layer's.
        steepness: `[]`, of the sigmoid that makes states.
        edges: `[M + 1]`, of the bins of states.
        num_images: `[]`.
        counts: `[D, M]`, images per feature and bin.
    """

    kernel: np.ndarray
    steepness: np.ndarray
    edges: np.ndarray
    num_images: np.ndarray
    counts: np.ndarray


@functools.cache
def neuron_counts(bins: int = 50, steepness: float = 3000.0) -> Statistic:
    """Counts of the states sigmoid(steepness h_i dKL(u||p)/dh_i) of each feature, by bin."""
    init = functools.partial(_none, bins, steepness)
    return Statistic(f"neuron counts ({bins} bins, {steepness})", init, _update, _merge)


def neuron_coverage(counts: NeuronCounts, usual: float = 0.01) -> NeuronCoverage:
    """How usual each state is: its fraction of the images over `usual`, at most 1.

    Raises:
        ValueError: there are no images, or `usual` is not in (0, 1].
    """
    if not 0 < usual <= 1:
        raise ValueError(f"usual must lie in (0, 1], got {usual!r}")
    if not counts.num_images:
        raise ValueError("no training images to fit to; give at least one")
    coverage = np.minimum(counts.counts / (usual * counts.num_images), 1)
    return NeuronCoverage(*map(jnp.asarray, (counts.edges, coverage, counts.steepness)))


def state_edges(bins: int) -> np.ndarray:
    """Edges of bins on [0, 1], finest about 1/2, which is where a feature of zero lies.

    From 0 to 1/2 they are log_1000 x for x spaced evenly from 1 to the root of 1000, and mirrored
    from there. Edges are numbers that float32 has, so that devices and hosts agree about 1/2.
    """
    below = np.log(np.linspace(1, math.sqrt(_BASE), bins // 2)) / math.log(_BASE)
    below[-1] = 0.5
    above = 1 - below[::-1]
    # A state of exactly 1 belongs to the last bin.
    above[-1] = 1.01
    return np.concatenate([below[:-1], above]).astype(np.float32).astype(np.float64)


def _none(bins: int, steepness: float, head: LinearHead) -> NeuronCounts:
    edges = state_edges(bins)
    counts = np.zeros((len(head.kernel), len(edges) - 1))
    return NeuronCounts(head.kernel, np.array(steepness), edges, np.array(0.0), counts)


def _update(value: NeuronCounts, examples: Examples) -> NeuronCounts:
    num_features, num_bins = value.counts.shape
    residual = softmax(examples.logits) - 1 / examples.logits.shape[1]
    slope = value.steepness * examples.features * (residual @ value.kernel.T)
    with np.errstate(over="ignore"):
        states = 1 / (1 + np.exp(-slope))
    bins = np.searchsorted(value.edges, states, side="right") - 1
    flat = bins + num_bins * np.arange(num_features)
    counts = np.bincount(flat.reshape(-1), minlength=value.counts.size).reshape(value.counts.shape)
    return value._replace(num_images=value.num_images + len(states), counts=value.counts + counts)


def _merge(left: NeuronCounts, right: NeuronCounts) -> NeuronCounts:
    return left._replace(
        num_images=left.num_images + right.num_images, counts=left.counts + right.counts
    )
