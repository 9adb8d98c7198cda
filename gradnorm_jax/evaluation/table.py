"""Scores of many images as columns."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Excluded(NamedTuple):
    """A file that is not, or could not be decoded as, an image.

    Attributes:
        id: of the file.
        reason: what is wrong with it.
        position: where in the source; -1 if it was passed over by its name.
    """

    id: str
    reason: str
    position: int = -1


class ScoreTable(NamedTuple):
    """The scores of one data set, a row per image that could be decoded, in source order.

    Attributes:
        positions: `[N]` int64, where in the source.
        ids: `[N]`, the images' ids.
        labels: `[N]` int32, their classes, -1 where unknown.
        predictions: `[N]` int32, the largest logit of each.
        scores: `[N]` float32 by detector.
        excluded: the files without a row.
    """

    positions: np.ndarray
    ids: list[str]
    labels: np.ndarray
    predictions: np.ndarray
    scores: Mapping[str, np.ndarray]
    excluded: list[Excluded]


def concatenate(tables: Sequence[ScoreTable]) -> ScoreTable:
    """One table of all rows of at least one table with the same detectors."""
    return ScoreTable(
        positions=np.concatenate([table.positions for table in tables]),
        ids=list(itertools.chain.from_iterable(table.ids for table in tables)),
        labels=np.concatenate([table.labels for table in tables]),
        predictions=np.concatenate([table.predictions for table in tables]),
        scores={
            name: np.concatenate([table.scores[name] for table in tables])
            for name in tables[0].scores
        },
        excluded=list(itertools.chain.from_iterable(table.excluded for table in tables)),
    )


def select(table: ScoreTable, rows: np.ndarray) -> ScoreTable:
    """The rows of a table with the given indices; of the excluded files, all."""
    return table._replace(
        positions=table.positions[rows],
        ids=[table.ids[i] for i in rows],
        labels=table.labels[rows],
        predictions=table.predictions[rows],
        scores={name: values[rows] for name, values in table.scores.items()},
    )


def up_to(table: ScoreTable, position: int) -> ScoreTable:
    """What a table holds of the positions before `position`."""
    kept = select(table, np.flatnonzero(table.positions < position))
    return kept._replace(excluded=[e for e in table.excluded if e.position < position])


def in_source_order(table: ScoreTable) -> ScoreTable:
    """The same table, whatever the order in which processes have made it."""
    if (np.diff(table.positions) < 0).any():
        table = select(table, np.argsort(table.positions))
    return table._replace(excluded=sorted(table.excluded, key=lambda each: each.position))


def covers(table: ScoreTable, length: int) -> bool:
    """Whether each of `length` positions has one row, or one entry among the excluded."""
    excluded = np.array([each.position for each in table.excluded], np.int64)
    positions = np.sort(np.concatenate([table.positions, excluded]))
    return np.array_equal(positions, np.arange(length))
