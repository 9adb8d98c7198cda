"""The main job: scores of ID and OOD images by all detectors, and how well they separate them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.sources import Source
from gradnorm_jax.detectors import Detector
from gradnorm_jax.evaluation.figures import compare
from gradnorm_jax.evaluation.passes import Execution, Fitted, fit_feed, fitting_mesh, score_feed
from gradnorm_jax.evaluation.scoring import Feed, Track, image_feed, no_progress
from gradnorm_jax.evaluation.table import Excluded, ScoreTable
from gradnorm_jax.metrics import Metrics
from gradnorm_jax.sharding import put_shared
from gradnorm_jax.types import Model

ID = "ID"
"""The name of the in-distribution set in tables and files."""
FIT = "fit"
"""The name of the training images in files."""


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
        tables: scores of the in-distribution images under the name "ID", then of each OOD set.
        accuracy: fraction of ID images with a known label that is predicted; None if none is known.
        metrics: figures with intervals, by detector and OOD set.
        not_run: why a detector was left out, by its name.
        fit_excluded: the files of the training images that could not be used.
    """

    tables: Mapping[str, ScoreTable]
    accuracy: float | None
    metrics: Mapping[str, Mapping[str, Metrics]]
    not_run: Mapping[str, str]
    fit_excluded: list[Excluded]


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
    """Evaluates detectors on one in-distribution set against one or more OOD sets, in memory.

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
        mesh: the devices to use, from `gradnorm_jax.sharding.batch_mesh`. By default all; each
            holds all parameters or, where these do not fit, a part of them (see `fitting_mesh`).
            Only if the model's arrays are NumPy's does no device ever hold all of them.
        track: shows progress.

    Raises:
        ValueError: no detector can be run, a score is not finite, a set has no usable image, or
            there are several processes.
    """
    sources = {ID: id_source, **ood_sources}
    fit = None
    if fit_source is not None and any(d.fit for d in detectors):
        fit = image_feed(FIT, fit_source, preprocess)
    return evaluate_feeds(
        model,
        {name: image_feed(name, source, preprocess) for name, source in sources.items()},
        detectors,
        fit=fit,
        label_offset=label_offset,
        execution=Execution(mesh=mesh or fitting_mesh(model), batch_size=batch_size, track=track),
    )


def evaluate_feeds(
    model: Model,
    feeds: Mapping[str, Feed],
    detectors: Sequence[Detector],
    *,
    fit: Feed | None,
    label_offset: int,
    execution: Execution,
    not_run: Mapping[str, str] | None = None,
) -> Evaluation:
    """Evaluates detectors on data sets that may not be images any more; see `evaluate`.

    Args:
        model: the classifier, or what the feeds need of it.
        feeds: the in-distribution set under the name "ID", and one or more others.
        detectors: those asked for.
        fit: labelled in-distribution training images.
        label_offset: class k is logit k + label_offset.
        execution: how passes are carried out.
        not_run: why a detector cannot be run, by its name.
    """
    unfitted = {
        d.name: "it is fitted to labelled ID training images, and none were given (--fit)"
        for d in detectors
        if d.fit and fit is None
    }
    not_run = unfitted | dict(not_run or {})
    detectors = tuple(d for d in detectors if d.name not in not_run)
    if not detectors:
        reasons = "; ".join(f"{name}: {why}" for name, why in not_run.items())
        raise ValueError(f"none of the detectors can be run: {reasons}")
    model = put_shared(execution.mesh, model)
    fitted = fit_feed(model, fit, detectors, execution) if fit else Fitted({}, [])
    tables = {
        name: score_feed(model, fitted.states, feed, detectors, execution)
        for name, feed in feeds.items()
    }
    rest = dict(tables)
    metrics = compare([d.name for d in detectors], rest.pop(ID), rest, execution)
    accuracy = _accuracy(tables[ID], label_offset)
    return Evaluation(tables, accuracy, metrics, not_run, fitted.excluded)


def _accuracy(table: ScoreTable, label_offset: int) -> float | None:
    known = table.labels >= 0
    if not known.any():
        return None
    return float((table.predictions[known] == table.labels[known] + label_offset).mean())
