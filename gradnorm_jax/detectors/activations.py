"""Detectors of inner activations: RankFeat, which edits them, and Gram matrices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.detectors.detector import Batch, Detector, Fit, images_of
from gradnorm_jax.detectors.network_pass import NetworkPass
from gradnorm_jax.detectors.options import builder
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.numerics import check_count
from gradnorm_jax.statistics.gram_ranges import (
    Extremes,
    extremes,
    gram_ranges,
    held_out_sum,
    mean_of_held_out,
)
from gradnorm_jax.statistics.readings import Read, of_reading
from gradnorm_jax.types import LinearHead, Model


@builder
def rankfeat(*, layers: int | Sequence[str] = 2, iterations: int = 20) -> Detector:
    """Energy without the first singular component of activations; see `scores.rankfeat`.

    At most about a forward pass a layer.

    Args:
        layers: which, as `taps` selects them, or how many of the last parts of the network.
        iterations: of the power iteration that finds the component.

    Raises:
        ValueError: an option is out of range.
    """
    check_count("iterations", iterations)
    options = {"layers": layers, "iterations": iterations}
    return Detector("rankfeat", "network", _rankfeat, options=options)


@builder
def gram(
    *,
    layers: int | Sequence[str] = 4,
    powers: int = 10,
    per_class: bool = True,
    held_out: float = 0.1,
) -> Detector:
    """Deviation of Gram matrices from those of training images; see `scores.gram`.

    About one forward pass, two in a small network. Fitted in two passes, of ranges and then of
    deviations, which need no labels. Of K = powers x channels of all layers, the ranges are two
    matrices `[C, K]`: 0.3 GB for a ResNet-50 and 1,000 classes.

    Args:
        layers: which, as `taps` selects them, or how many of the last parts of the network; the
            paper takes all convolutions and what follows them.
        powers: the largest power of the activations, from 1 on; the paper's is 10, and OpenOOD's 5.
        per_class: a range for each predicted class, as in the paper, or one for all images.
        held_out: the fraction of training images, by their positions, that the ranges are not
            from, and by whose mean deviations each layer is measured.

    Raises:
        ValueError: an option is out of range.
    """
    check_count("powers", powers)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out!r}")
    rows = NetworkPass(scores.gram_rows, {"layers": layers, "powers": powers})
    fit = _gram_fit(rows, per_class, held_out)
    return Detector("gram", "network", _gram, fit, {"rows": rows})


@functools.cache
def _gram_fit(rows: NetworkPass, per_class: bool, held_out: float) -> Fit:
    told, options = dict(rows.options), {"rows": rows}
    reading = Reading(f"gram_rows({told})", _gram_rows, options=options)
    of_ranges = Fit((of_reading(extremes(held_out, per_class), reading),), _ranges)
    name = f"gram_deviations({told}, {per_class}, {held_out})"
    deviations = Reading(name, _gram_deviations, of_ranges, options)

    def finalize(head: LinearHead, found: Read, sums: Read) -> scores.GramFit:
        scale = jnp.asarray(mean_of_held_out(sums.value))
        return scores.GramFit(_ranges(head, found), scale)

    return Fit((*of_ranges.statistics, of_reading(held_out_sum(held_out), deviations)), finalize)


def _ranges(head: LinearHead, found: Read) -> scores.GramRanges:
    value: Extremes = found.value
    return gram_ranges(value)


def _rankfeat(state: None, model: Model, batch: Batch, **options: Any) -> jax.Array:
    return scores.rankfeat(model, images_of(batch), **options)


def _gram_rows(state: None, model: Model, batch: Batch, *, rows: NetworkPass) -> jax.Array:
    return jnp.concatenate(list(rows(model, batch).values()), axis=1)


def _gram_deviations(
    state: scores.GramRanges, model: Model, batch: Batch, *, rows: NetworkPass
) -> jax.Array:
    return scores.gram_deviations(rows(model, batch), batch.outputs.logits, state)


def _gram(state: scores.GramFit, model: Model, batch: Batch, *, rows: NetworkPass) -> jax.Array:
    deviations = _gram_deviations(state.ranges, model, batch, rows=rows)
    return scores.gram(deviations, batch.outputs.logits, state.scale)
