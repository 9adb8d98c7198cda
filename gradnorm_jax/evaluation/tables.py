"""The tables of a report as text cells, whatever they are then shown in."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from gradnorm_jax.evaluation.records import ID
from gradnorm_jax.metrics import Estimate, Metrics
from gradnorm_jax.text import escape_markdown

if TYPE_CHECKING:
    from gradnorm_jax.evaluation.report import Result

HEADLINE = {
    "FPR95 ↓": "fpr_at_95_tpr_id_positive",
    "AUROC ↑": "auroc",
    "AUPR ↑": "aupr_in",
}
ALL_METRICS = {
    "AUROC": "auroc",
    "AUPR-in": "aupr_in",
    "AUPR-out": "aupr_out",
    "FPR95 (ID positive)": "fpr_at_95_tpr_id_positive",
    "FPR95 (OOD positive)": "fpr_at_95_tpr_ood_positive",
    "Detection error": "detection_error",
}
LEGEND = (
    "the best of a column, and all that are not significantly worse at the 5 % level (paired tests "
    "on the same inputs, with Holm's correction)."
)
"""What it means that a value is marked."""


class Table(NamedTuple):
    """Text cells under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def averages(cells: Iterable[Metrics]) -> dict[str, float]:
    """The mean of each metric over OOD sets, by its name in `Metrics`."""
    cells = list(cells)
    names = [field.name for field in dataclasses.fields(Metrics)]
    return {name: fmean(getattr(cell, name).value for cell in cells) for name in names}


def headline_table(
    result: "Result",
    mark: Callable[[str, bool], str],
    separator: str = " / ",
    metrics: Iterable[str] = HEADLINE.values(),
) -> Table:
    """Detectors by OOD sets and their average, as in Table 1 of the paper, in percent.

    Args:
        result: of an evaluation.
        mark: shows a value, told whether it is among the best of its column.
        separator: between the values of a cell.
        metrics: what each cell holds, by the names in `Metrics`.
    """
    metrics = list(metrics)
    sets = [name for name in result.tables if name != ID]
    leaders = {
        (name, metric): best[metric].leaders()
        for name, best in result.best.items()
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
        for detector, cells in result.metrics.items()
    ]
    rows += [[detector, *["not run"] * (len(sets) + 1)] for detector in result.not_run]
    return Table(["Detector", *sets, "Average"], rows)


def full_table(result: "Result") -> Table:
    """Every metric of every detector on every OOD set with its interval, in percent."""

    def show(estimate: Estimate) -> str:
        value, low, high = (100 * x for x in dataclasses.astuple(estimate))
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    rows = [
        [detector, name, *(show(getattr(cell, metric)) for metric in ALL_METRICS.values())]
        for detector, cells in result.metrics.items()
        for name, cell in cells.items()
    ]
    return Table(["Detector", "OOD set", *ALL_METRICS], rows)


def to_markdown(table: Table, names: int = 1) -> str:
    """A table in GitHub's Markdown, the first columns of which hold names."""
    header = list(map(escape_markdown, table.header))
    aligned = [":---", *["---:"] * (len(header) - 1)]
    rows = [[*map(escape_markdown, row[:names]), *row[names:]] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, aligned, *rows])
