"""How often each neuron was in each state, of states that are read inside the network."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gradnorm_jax.scores.inner import Coverage
from gradnorm_jax.statistics.moments import merge_sums
from gradnorm_jax.statistics.neuron_counts import state_edges
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class StateCounts(NamedTuple):
    """Counts of states.

    Attributes:
        num_images: `[]`.
        counts: `[K, M]`, images per neuron and bin.
    """

    num_images: np.ndarray
    counts: np.ndarray


@functools.cache
def state_counts(bins: int = 50) -> Statistic:
    """Counts of states in [0, 1], in the bins of `state_edges`; a reading takes their place."""
    edges = state_edges(bins)
    num_bins = len(edges) - 1

    def init(head: LinearHead) -> StateCounts:
        return StateCounts(np.array(0.0), np.zeros((len(head.kernel), num_bins)))

    def update(value: StateCounts, examples: Examples) -> StateCounts:
        states = examples.features
        found = np.searchsorted(edges, states, side="right") - 1
        flat = found.clip(0, num_bins - 1) + num_bins * np.arange(states.shape[1])
        counts = np.bincount(flat.reshape(-1), minlength=value.counts.size)
        new = StateCounts(np.array(float(len(states))), counts.reshape(value.counts.shape))
        return merge_sums(value, new)

    return Statistic(f"state counts ({bins} bins)", init, update, merge_sums)


def state_coverage(counts: StateCounts, bins: int, usual: float) -> Coverage:
    """How usual each state is: its fraction of the images over `usual`, at most 1.

    Raises:
        ValueError: there are no images.
    """
    if not counts.num_images:
        raise ValueError("no training images to fit to; give at least one")
    coverage = np.minimum(counts.counts / (usual * counts.num_images), 1)
    return Coverage(jnp.asarray(state_edges(bins)), jnp.asarray(coverage))
