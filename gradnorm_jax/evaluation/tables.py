"""The tables of a report as text cells, whatever they are then shown in."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from gradnorm_jax.metrics import Best, Estimate, Metrics
from gradnorm_jax.text import escape_markdown

HEADLINE = {
    "FPR95 ↓": "fpr_at_95_tpr_id_positive",
    "AUROC ↑": "auroc",
    "AUPR ↑": "aupr_in",
}
"""The metrics of the paper's tables, by what they are called there."""
ALL_METRICS = {
    "AUROC": "auroc",
    "AUPR-in": "aupr_in",
    "AUPR-out": "aupr_out",
    "FPR95 (ID positive)": "fpr_at_95_tpr_id_positive",
    "FPR95 (OOD positive)": "fpr_at_95_tpr_ood_positive",
    "Detection error": "detection_error",
}
AVERAGE = "Average"
LEGEND = (
    "the best of a column, and all that are not significantly worse at the 5 % level (paired tests "
    "on the same inputs, with Holm's correction)."
)
"""What it means that a value is marked."""


Cells = Mapping[tuple[str, ...], Mapping[str, Metrics]]
"""Metrics by the names of a row and by OOD set."""


class Table(NamedTuple):
    """Text cells under a header.

    Attributes:
        header: of each column.
        rows: of cells.
        names: how many columns, the first, hold names.
        groups: titles over so many columns each, after those of names.
        marked: rows and columns of the cells that are marked.
        caption: what it shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    groups: Sequence[tuple[str, int]] = ()
    marked: Collection[tuple[int, int]] = ()
    caption: str = ""


def averages(cells: Iterable[Metrics]) -> dict[str, float]:
    """The mean of each metric over OOD sets, by its name in `Metrics`."""
    cells = list(cells)
    names = [field.name for field in dataclasses.fields(Metrics)]
    return {name: fmean(getattr(cell, name).value for cell in cells) for name in names}


class Headline(NamedTuple):
    """What Table 1 of the paper is made of.

    Attributes:
        cells: metrics by detector and OOD set.
        best: by OOD set and metric, the best detector and how it does against the others.
        not_run: the detectors that were left out.
    """

    cells: Mapping[str, Mapping[str, Metrics]]
    best: Mapping[str, Mapping[str, Best]]
    not_run: Collection[str]


def headline_table(
    headline: Headline,
    mark: Callable[[str, bool], str],
    separator: str = " / ",
    metrics: Iterable[str] = HEADLINE.values(),
) -> Table:
    """Detectors by OOD sets and their average, as in Table 1 of the paper, in percent.

    Args:
        headline: what it is made of.
        mark: shows a value, told whether it is among the best of its column.
        separator: between the values of a cell.
        metrics: what each cell holds, by the names in `Metrics`.
    """
    metrics = list(metrics)
    sets = list(next(iter(headline.cells.values()), {}))
    leaders = {
        (name, metric): best[metric].leaders()
        for name, best in headline.best.items()
        for metric in metrics
    }

    def show(detector: str, name: str, cells: Iterable[Metrics]) -> str:
        values = averages(cells)
        return separator.join(
            mark(f"{100 * values[metric]:.2f}", detector in leaders.get((name, metric), ()))
            for metric in metrics
        )

    rows = [
        [
            detector,
            *(show(detector, name, [cells[name]]) for name in sets),
            show(detector, "", cells.values()),
        ]
        for detector, cells in headline.cells.items()
    ]
    rows += [[detector, *["not run"] * (len(sets) + 1)] for detector in headline.not_run]
    return Table(["Detector", *sets, AVERAGE], rows)


def grouped_table(
    cells: Cells,
    best: Mapping[tuple[str, str], Collection[tuple[str, ...]]],
    names: Sequence[str],
    caption: str = "",
) -> Table:
    """As in Table 1 of the paper, a column for each metric of each OOD set, in percent.

    Args:
        cells: of rows that all have the same sets.
        best: by OOD set and name in `Metrics`, the rows that are marked.
        names: headers of the columns of names.
        caption: what it shows.
    """
    sets = list(next(iter(cells.values()), {}))
    columns = [(name, metric) for name in [*sets, AVERAGE] for metric in HEADLINE.values()]
    rows, marked = [], set()
    for i, (row, by_set) in enumerate(cells.items()):
        values = {name: averages([by_set[name]]) for name in sets}
        values[AVERAGE] = averages(by_set.values())
        rows.append([*row, *(f"{100 * values[name][metric]:.2f}" for name, metric in columns)])
        marked |= {
            (i, len(row) + j) for j, column in enumerate(columns) if row in best.get(column, ())
        }
    header = [*names, *(metric for _ in [*sets, AVERAGE] for metric in HEADLINE)]
    groups = [(name, len(HEADLINE)) for name in [*sets, AVERAGE]]
    return Table(header, rows, len(names), groups, marked, caption)


def full_table(cells: Mapping[str, Mapping[str, Metrics]]) -> Table:
    """Every metric of every detector on every OOD set with its interval, in percent."""

    def show(estimate: Estimate) -> str:
        value, low, high = (100 * x for x in dataclasses.astuple(estimate))
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    rows = [
        [detector, name, *(show(getattr(cell, metric)) for metric in ALL_METRICS.values())]
        for detector, by_set in cells.items()
        for name, cell in by_set.items()
    ]
    return Table(["Detector", "OOD set", *ALL_METRICS], rows, names=2)


def to_markdown(table: Table) -> str:
    """A table in GitHub's Markdown, in which the columns of a group share one."""
    names, header = table.names, list(map(escape_markdown, table.header))
    rows = [
        [
            *map(escape_markdown, row[:names]),
            *(
                f"**{x}**" if (i, j) in table.marked else x
                for j, x in enumerate(row[names:], names)
            ),
        ]
        for i, row in enumerate(table.rows)
    ]
    if table.groups:
        header, *rows = (_joined(row, table) for row in [header, *rows])
        header[names:] = [escape_markdown(title) for title, _ in table.groups]
    aligned = [":---"] * names + ["---:"] * (len(header) - names)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, aligned, *rows])


def _joined(row: Sequence[str], table: Table) -> list[str]:
    ends = itertools.accumulate((size for _, size in table.groups), initial=table.names)
    spans = itertools.pairwise(ends)
    return [*row[: table.names], *(" / ".join(row[start:end]) for start, end in spans)]
