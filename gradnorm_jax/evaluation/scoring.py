"""From images to scores: one forward pass for all detectors, split over all devices."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from gradnorm_jax.data.loader import HostBatch, batches, num_batches
from gradnorm_jax.data.preprocess import Preprocess, scale
from gradnorm_jax.data.sources import Source
from gradnorm_jax.detectors import Batch, Detector, Fit
from gradnorm_jax.sharding import batch_mesh, map_batch, split_batch
from gradnorm_jax.types import Model, Outputs

Item = TypeVar("Item")
Track = Callable[[Iterable[Item], str, int], Iterable[Item]]
"""Shows progress: `(items, description, total) -> items`."""


def no_progress(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """The `Track` that shows nothing."""
    return items


class ScoreTable(NamedTuple):
    """The scores of one data set, a row per image that could be decoded, in source order.

    Attributes:
        ids: `[N]`, the images' ids.
        labels: `[N]` int32, their classes, -1 where unknown.
        predictions: `[N]` int32, the largest logit of each.
        scores: `[N]` float32 by detector.
        excluded: id and reason of each file that is not, or could not be decoded as, an image.
    """

    ids: list[str]
    labels: np.ndarray
    predictions: np.ndarray
    scores: Mapping[str, np.ndarray]
    excluded: list[tuple[str, str]]


class Fitted(NamedTuple):
    """What detectors have learned from in-distribution training images.

    Attributes:
        states: by name of the detector, for those that are fitted.
        excluded: id and reason of each file that is not, or could not be decoded as, an image.
    """

    states: Mapping[str, Any]
    excluded: list[tuple[str, str]]


@functools.partial(jax.jit, static_argnames=("detectors", "preprocess", "mesh"))
def score_pixels(
    model: Model,
    states: Mapping[str, Any],
    pixels: jax.Array,
    *,
    detectors: tuple[Detector, ...],
    preprocess: Preprocess,
    mesh: Mesh,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predictions `[B]` and scores `[B]` by detector of uint8 pixels `[B, H, W, 3]`.

    B must be a multiple of the number of devices in `mesh`. `states` holds the state of each
    detector that is fitted.
    """

    def score_slice(shared: tuple[Model, Mapping[str, Any]], pixels: jax.Array) -> Any:
        model, states = shared
        images = scale(pixels, preprocess)
        batch = Batch(images, model(images))
        scores = {d.name: d.score(states.get(d.name), model, batch) for d in detectors}
        return batch.outputs.logits.argmax(axis=-1), scores

    return map_batch(score_slice, mesh)((model, states), pixels)


@functools.partial(jax.jit, static_argnames=("preprocess", "mesh"))
def forward_pixels(
    model: Model, pixels: jax.Array, *, preprocess: Preprocess, mesh: Mesh
) -> Outputs:
    """Features `[B, D]` and logits `[B, C]` of uint8 pixels `[B, H, W, 3]`."""

    def forward_slice(model: Model, pixels: jax.Array) -> Outputs:
        return model(scale(pixels, preprocess))

    return map_batch(forward_slice, mesh)(model, pixels)


def score_source(
    model: Model,
    states: Mapping[str, Any],
    source: Source,
    *,
    detectors: tuple[Detector, ...],
    preprocess: Preprocess,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    track: Track[Any] = no_progress,
) -> ScoreTable:
    """Scores every image of a source; see `score_pixels`.

    Scores depend neither on the batch size, which is rounded up to a multiple of the number of
    devices, nor on how batches are filled.

    Raises:
        ValueError: a score is not finite, or no image could be decoded.
    """
    mesh = mesh or batch_mesh()
    step = functools.partial(
        score_pixels, model, states, detectors=detectors, preprocess=preprocess, mesh=mesh
    )
    parts: list[ScoreTable] = []
    for batch, result in _run(step, source, preprocess, batch_size, mesh, track):
        predictions, scores = jax.device_get(result)
        valid = batch.mask
        parts.append(
            ScoreTable(
                ids=list(itertools.compress(batch.ids, valid)),
                labels=batch.labels[valid],
                predictions=predictions[valid],
                scores={name: values[valid] for name, values in scores.items()},
                excluded=list(batch.bad),
            )
        )
        _check_finite(parts[-1], source.name)
    table = _concatenate(parts)
    if not table.ids:
        raise ValueError(
            f"none of the {len(source)} images of {source.name} could be decoded; the first: "
            f"{': '.join(table.excluded[0])}"
        )
    return table._replace(excluded=_ignored(source) + table.excluded)


def fit_detectors(
    model: Model,
    source: Source,
    *,
    detectors: Sequence[Detector],
    preprocess: Preprocess,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    track: Track[Any] = no_progress,
) -> Fitted:
    """Fits all detectors that need it, in one pass over labelled training images.

    Raises:
        ValueError: an image has no label within the network's classes, or there are too few.
    """
    fits: dict[str, Fit] = {d.name: d.fit for d in detectors if d.fit}
    mesh = mesh or batch_mesh()
    step = functools.partial(forward_pixels, model, preprocess=preprocess, mesh=mesh)
    statistics: dict[str, Any] = {}
    excluded = _ignored(source)
    for batch, result in _run(step, source, preprocess, batch_size, mesh, track):
        outputs = Outputs(*(x[batch.mask] for x in jax.device_get(result)))
        update = {name: fit.update(outputs, batch.labels[batch.mask]) for name, fit in fits.items()}
        statistics = jax.tree.map(np.add, statistics, update) if statistics else update
        excluded.extend(batch.bad)
    return Fitted({name: fit.finalize(statistics[name]) for name, fit in fits.items()}, excluded)


def _run(
    step: Callable[[jax.Array], Any],
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    mesh: Mesh,
    track: Track[Any],
) -> Iterator[tuple[HostBatch, Any]]:
    """Pairs of a batch and what `step` makes of its pixels, with one step always under way."""
    batch_size = -(-batch_size // mesh.size) * mesh.size
    pending: tuple[HostBatch, Any] | None = None
    steps = batches(source, preprocess, batch_size)
    for batch in track(steps, source.name, num_batches(len(source), batch_size)):
        following = batch, step(jax.device_put(batch.pixels, split_batch(mesh)))
        if pending:
            yield pending
        pending = following
    if pending:
        yield pending


def _ignored(source: Source) -> list[tuple[str, str]]:
    return [(file, "not an image by its name") for file in source.ignored]


def _check_finite(part: ScoreTable, name: str) -> None:
    for detector, values in part.scores.items():
        bad = list(itertools.compress(part.ids, ~np.isfinite(values)))
        if bad:
            raise ValueError(
                f"{detector} gives scores that are not finite on {name}, for {len(bad)} images of "
                f"a batch ({', '.join(bad[:5])}): check the weights and the preprocessing"
            )


def _concatenate(parts: Sequence[ScoreTable]) -> ScoreTable:
    return ScoreTable(
        ids=list(itertools.chain.from_iterable(part.ids for part in parts)),
        labels=np.concatenate([part.labels for part in parts]),
        predictions=np.concatenate([part.predictions for part in parts]),
        scores={
            name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores
        },
        excluded=list(itertools.chain.from_iterable(part.excluded for part in parts)),
    )
