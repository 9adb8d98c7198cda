"""The main job: scores of ID and OOD images by all detectors, and how well they separate them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.sources import Source
from gradnorm_jax.detectors import Detector
from gradnorm_jax.evaluation.scoring import (
    Fitted,
    ScoreTable,
    Track,
    fit_detectors,
    no_progress,
    score_source,
)
from gradnorm_jax.metrics import Metrics, evaluate_scores
from gradnorm_jax.types import Model

ID = "ID"
"""The name of the in-distribution set in tables and files."""


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
        tables: scores of the in-distribution images under the name "ID", then of each OOD set.
        accuracy: fraction of ID images with a known label that is predicted; None if none is known.
        metrics: figures with intervals, by detector and OOD set.
        not_run: why a detector was left out, by its name.
        fit_excluded: id and reason of each file of the training images that could not be used.
    """

    tables: Mapping[str, ScoreTable]
    accuracy: float | None
    metrics: Mapping[str, Mapping[str, Metrics]]
    not_run: Mapping[str, str]
    fit_excluded: list[tuple[str, str]]


def evaluate(
    model: Model,
    *,
    preprocess: Preprocess,
    id_source: Source,
    ood_sources: Mapping[str, Source],
    detectors: Sequence[Detector],
    fit_source: Source | None = None,
    batch_size: int = 64,
    label_offset: int = 0,
    mesh: Mesh | None = None,
    track: Track[Any] = no_progress,
) -> Evaluation:
    """Evaluates detectors on one in-distribution set against one or more OOD sets.

    Args:
        model: the classifier; see `gradnorm_jax.adapters` for how to make one.
        preprocess: how images become the network's input.
        id_source: in-distribution test images.
        ood_sources: out-of-distribution images by the name of their set.
        detectors: from `parse_detectors`, or your own.
        fit_source: labelled in-distribution training images. Without them detectors that need to be
            fitted are not run.
        batch_size: rounded up to a multiple of the number of devices; no result depends on it.
        label_offset: class k is logit k + label_offset; it matters to the accuracy alone.
        mesh: the devices to use; all by default.
        track: shows progress.

    Raises:
        ValueError: no detector can be run, a score is not finite, or a set has no usable image.
    """
    not_run = {
        d.name: "it is fitted to labelled ID training images, and none were given (--fit)"
        for d in detectors
        if d.fit and fit_source is None
    }
    detectors = tuple(d for d in detectors if d.name not in not_run)
    if not detectors:
        raise ValueError(
            f"none of the detectors can be run: {', '.join(not_run)} must be fitted to labelled ID "
            "training images; give some (--fit) or another detector"
        )
    common: dict[str, Any] = {
        "detectors": detectors,
        "preprocess": preprocess,
        "batch_size": batch_size,
        "mesh": mesh,
        "track": track,
    }
    fitted = Fitted({}, [])
    if fit_source is not None and any(d.fit for d in detectors):
        fitted = fit_detectors(model, fit_source, **common)
    tables = {
        name: score_source(model, fitted.states, source, **common)
        for name, source in {ID: id_source, **ood_sources}.items()
    }
    metrics = {
        d.name: {
            name: evaluate_scores(tables[ID].scores[d.name], tables[name].scores[d.name])
            for name in ood_sources
        }
        for d in detectors
    }
    accuracy = _accuracy(tables[ID], label_offset)
    return Evaluation(tables, accuracy, metrics, not_run, fitted.excluded)


def _accuracy(table: ScoreTable, label_offset: int) -> float | None:
    known = table.labels >= 0
    if not known.any():
        return None
    return float((table.predictions[known] == table.labels[known] + label_offset).mean())
