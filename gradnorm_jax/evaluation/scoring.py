"""From images, or the outputs kept of them, to scores: one forward pass for all detectors."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from gradnorm_jax.data.loader import HostBatch, batches
from gradnorm_jax.data.preprocess import Preprocess, scale
from gradnorm_jax.data.sources import Source
from gradnorm_jax.data.split import Split
from gradnorm_jax.detectors import Batch, Detector
from gradnorm_jax.evaluation.table import Excluded, ScoreTable
from gradnorm_jax.sharding import local_rows, map_batch, put_batch
from gradnorm_jax.types import Model, Outputs

Item = TypeVar("Item")
Track = Callable[[Iterable[Item], str, int], Iterable[Item]]
"""Shows progress: `(items, description, total) -> items`."""


def no_progress(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """The `Track` that shows nothing."""
    return items


States = Mapping[str, Any]
"""What fitted detectors have learned, by their names."""


class Scored(NamedTuple):
    """What is computed of a batch.

    Attributes:
        predictions: `[B]`, the largest logit of each image.
        scores: `[B]` by detector.
        outputs: features `[B, D]` and logits `[B, C]`, from which detectors learn.
    """

    predictions: jax.Array
    scores: dict[str, jax.Array]
    outputs: Outputs


class Chunk(NamedTuple):
    """One process's part of a batch before it is scored.

    Attributes:
        data: pytree of arrays `[B, ...]` that go to the devices.
        mask: `[B]` bool, whether the row holds an image; N of them do.
        positions: `[N]` int64, where in the data set.
        ids: N ids.
        labels: `[N]` int32, -1 where unknown.
        excluded: the files of this batch that could not be decoded.
    """

    data: Any
    mask: np.ndarray
    positions: np.ndarray
    ids: list[str]
    labels: np.ndarray
    excluded: list[Excluded]


class Score(Protocol):
    """Computes on the devices what is wanted of `Chunk.data`."""

    def __call__(  # noqa: D102
        self,
        model: Model,
        states: States,
        data: Any,
        /,
        *,
        detectors: tuple[Detector, ...],
        mesh: Mesh,
    ) -> Scored: ...


class Feed(NamedTuple):
    """A data set on its way to the devices.

    Attributes:
        name: what tables and files call the set.
        length: the number of its positions.
        ignored: the files that were passed over because of their names.
        chunks: `(split, start) -> chunks` of this process, from step `start` on.
        score: the computation that its chunks need.
    """

    name: str
    length: int
    ignored: Sequence[str]
    chunks: Callable[[Split, int], Iterator[Chunk]]
    score: Score


class Step(NamedTuple):
    """What has become of a `Chunk`.

    Attributes:
        table: a row for each image.
        mask: `[B]` bool, which of this process's rows hold an image.
        outputs: `[B, ...]` on the devices of all processes.
        statistics: what the images tell fitted detectors, to be added up; see `detectors.Fit`.
    """

    table: ScoreTable
    mask: np.ndarray
    outputs: Outputs
    statistics: Any


def image_feed(
    name: str,
    source: Source,
    preprocess: Preprocess,
    *,
    workers: int | None = None,
    worker_processes: bool = False,
) -> Feed:
    """The images of a source, which go through the network; for workers see `batches`."""
    load = functools.partial(
        batches, source, preprocess, workers=workers, worker_processes=worker_processes
    )

    def chunks(split: Split, start: int) -> Iterator[Chunk]:
        return map(_to_chunk, load(split, start=start))

    score = functools.partial(score_pixels, preprocess=preprocess)
    return Feed(name, len(source), source.ignored, chunks, score)


def _to_chunk(batch: HostBatch) -> Chunk:
    undecodable = batch.positions[~batch.mask & (batch.positions >= 0)]
    return Chunk(
        batch.pixels,
        batch.mask,
        batch.positions[batch.mask],
        list(itertools.compress(batch.ids, batch.mask)),
        batch.labels[batch.mask],
        [Excluded(*bad, int(at)) for bad, at in zip(batch.bad, undecodable, strict=True)],
    )


@functools.partial(jax.jit, static_argnames=("detectors", "preprocess", "mesh"))
def score_pixels(
    model: Model,
    states: States,
    pixels: jax.Array,
    *,
    detectors: tuple[Detector, ...],
    preprocess: Preprocess,
    mesh: Mesh,
) -> Scored:
    """Scores uint8 pixels `[B, H, W, 3]`.

    B must be a multiple of the number of devices in `mesh`. `states` holds the state of each
    detector that is fitted.
    """

    def score_slice(shared: tuple[Model, States], pixels: jax.Array) -> Scored:
        images = scale(pixels, preprocess)
        batch = Batch(images, shared[0](images))
        predictions = batch.outputs.logits.argmax(axis=-1)
        return Scored(predictions, _score(shared, batch, detectors), batch.outputs)

    return map_batch(score_slice, mesh)((model, states), pixels)


@functools.partial(jax.jit, static_argnames=("detectors", "mesh"))
def score_outputs(
    model: Model,
    states: States,
    kept: tuple[Outputs, jax.Array],
    *,
    detectors: tuple[Detector, ...],
    mesh: Mesh,
) -> Scored:
    """Scores what was kept of an earlier forward pass: its outputs and predictions `[B]`."""

    def score_slice(shared: tuple[Model, States], kept: tuple[Outputs, jax.Array]) -> Scored:
        outputs, predictions = kept
        return Scored(predictions, _score(shared, Batch(None, outputs), detectors), outputs)

    return map_batch(score_slice, mesh)((model, states), kept)


def _score(
    shared: tuple[Model, States], batch: Batch, detectors: tuple[Detector, ...]
) -> dict[str, jax.Array]:
    model, states = shared
    return {d.name: d.score(states.get(d.name), model, batch) for d in detectors}


def run_steps(
    feed: Feed,
    model: Model,
    states: States,
    *,
    detectors: tuple[Detector, ...],
    mesh: Mesh,
    split: Split,
    track: Track[Any],
    start: int = 0,
) -> Iterator[Step]:
    """Scores a data set from step `start` on, with one step always under way on the devices.

    Raises:
        ValueError: a score is not finite.
    """
    score = functools.partial(feed.score, model, states, detectors=detectors, mesh=mesh)
    remaining = split.num_steps(feed.length) - start
    started = (
        (chunk._replace(data=None), score(put_batch(mesh, chunk.data)))
        for chunk in track(feed.chunks(split, start), feed.name, remaining)
    )
    for chunk, scored in one_ahead(started):
        yield _to_step(feed, chunk, scored)


def one_ahead(started: Iterable[Item]) -> Iterator[Item]:
    """What has been started, each when the next has been started too."""
    return map(operator.itemgetter(0), itertools.pairwise(itertools.chain(started, [None])))


def _to_step(feed: Feed, chunk: Chunk, scored: Scored) -> Step:
    predictions, scores = jax.tree.map(
        lambda array: local_rows(array)[chunk.mask], (scored.predictions, scored.scores)
    )
    table = ScoreTable(
        chunk.positions, chunk.ids, chunk.labels, predictions, scores, chunk.excluded
    )
    _check_finite(table, feed.name)
    return Step(table, chunk.mask, scored.outputs, {})


def _check_finite(table: ScoreTable, name: str) -> None:
    for detector, values in table.scores.items():
        bad = list(itertools.compress(table.ids, ~np.isfinite(values)))
        if bad:
            raise ValueError(
                f"{detector} gives scores that are not finite on {name}, for {len(bad)} images of "
                f"a batch ({', '.join(bad[:5])}): check the weights and the preprocessing"
            )
