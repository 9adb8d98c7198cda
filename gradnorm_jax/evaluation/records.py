"""Scores as they come, batch by batch, and as tables."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.types import Outputs

ID = "ID"
"""The name of the in-distribution set in tables and files."""
FIT = "fit"
"""The name of the training data that detectors are fitted to."""


class Interrupted(Exception):  # noqa: N818
    """The run has stopped before its end; the same call resumes it."""


class Unfinished(Exception):  # noqa: N818
    """This process has done its share of the run, and others have not done theirs."""


class ScoreTable(NamedTuple):
    """The scores of one data set, a row per usable input, in the order of the data set.

    Attributes:
        positions: `[N]` int64, where in the data set.
        ids: `[N]`, the inputs' ids.
        labels: `[N]` int32, their classes, -1 where unknown.
        predictions: `[N]` int32, the largest logit of each.
        scores: `[N]` float32 by detector.
        excluded: the inputs without a row.
    """

    positions: np.ndarray
    ids: Sequence[str]
    labels: np.ndarray
    predictions: np.ndarray
    scores: Mapping[str, np.ndarray]
    excluded: Sequence[Excluded]


class ScoredBatch(NamedTuple):
    """What has become of a `HostBatch`.

    Attributes:
        number: which batch of the data set this is.
        mask: `[B]` bool, which rows hold an input.
        table: a row for each input.
        outputs: features and logits `[B, ...]` on the devices; None for a batch without an input.
    """

    number: int
    mask: np.ndarray
    table: ScoreTable
    outputs: Outputs | None


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


def select_scores(table: ScoreTable, detectors: Iterable[str]) -> ScoreTable:
    """The table with the scores of these detectors alone."""
    return table._replace(scores={name: table.scores[name] for name in detectors})


def count_positions(table: ScoreTable) -> int:
    """How many positions a table accounts for, by a row or as excluded."""
    return len(table.positions) + sum(each.position >= 0 for each in table.excluded)
