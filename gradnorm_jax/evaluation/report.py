"""The result of an evaluation, and its tables for terminal, notebook, Markdown and programs."""

import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table
import rich.text

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import FIT, ID, ScoreTable
from gradnorm_jax.metrics import Estimate, Metrics
from gradnorm_jax.text import escape_markdown, printable

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
CAPTION = (
    f"Each cell: {' / '.join(HEADLINE)}, in percent. FPR95 takes ID as the positive class, AUPR "
    "likewise; higher scores mean more in-distribution."
)
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """How well detectors tell an in-distribution set from out-of-distribution sets.

    `print(result)` shows the table of the paper; so does a notebook. `result["gradnorm", "svhn"]`
    are the metrics of a detector on an OOD set, each with its interval:
    `result["gradnorm", "svhn"].auroc.value`.

    Attributes:
        tables: scores of the in-distribution inputs under the name "ID", then of each OOD set.
        metrics: by detector and OOD set.
        accuracy: fraction of ID inputs with a known label that is predicted; None if that cannot be
            known.
        not_run: why a detector was left out, by its name.
        fit_excluded: the training inputs that could not be used.
        warnings: a sentence on everything that may not be as it seems.
    """

    tables: Mapping[str, ScoreTable]
    metrics: Mapping[str, Mapping[str, Metrics]]
    accuracy: float | None = None
    not_run: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fit_excluded: Sequence[Excluded] = ()
    warnings: Sequence[str] = ()

    def __getitem__(self, key: tuple[str, str]) -> Metrics:
        """The metrics of `(detector, OOD set)`; KeyError that lists both if there are none."""
        detector, name = key
        if detector not in self.metrics or name not in self.metrics[detector]:
            raise KeyError(
                f"no metrics of {key}; detectors: {', '.join(self.metrics)}; OOD sets: "
                f"{', '.join(name for name in self.tables if name != ID)}"
            )
        return self.metrics[detector][name]

    @property
    def scores(self) -> dict[tuple[str, str], np.ndarray]:
        """Scores `[N]` by detector and data set, `result.scores["gradnorm", "ID"]`."""
        return {
            (detector, name): scores
            for name, table in self.tables.items()
            for detector, scores in table.scores.items()
        }

    def __str__(self) -> str:
        """The table of the paper, and what it leaves out, as plain text."""
        return to_text(self)

    def _repr_html_(self) -> str:
        return to_html(self)


class Table(NamedTuple):
    """Text cells under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def averages(cells: Iterable[Metrics]) -> dict[str, float]:
    """The mean of each metric over OOD sets, by its name in `Metrics`."""
    cells = list(cells)
    names = [field.name for field in dataclasses.fields(Metrics)]
    return {name: fmean(getattr(cell, name).value for cell in cells) for name in names}


def headline_table(result: Result, separator: str = " / ") -> Table:
    """Detectors by OOD sets and their average, as in Table 1 of the paper, in percent."""

    def show(cells: Iterable[Metrics]) -> str:
        values = averages(cells)
        return separator.join(f"{100 * values[name]:.2f}" for name in HEADLINE.values())

    sets = [name for name in result.tables if name != ID]
    rows = [
        [detector, *(show([cells[name]]) for name in sets), show(cells.values())]
        for detector, cells in result.metrics.items()
    ]
    rows += [[detector, *["not run"] * (len(sets) + 1)] for detector in result.not_run]
    return Table(["Detector", *sets, "Average"], rows)


def full_table(result: Result) -> Table:
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


def data_sets(result: Result) -> list[str]:
    """A sentence on each data set."""
    lines = [f"{name}: {len(table.ids)} inputs" for name, table in result.tables.items()]
    if result.accuracy is not None:
        lines[0] += f", top-1 accuracy {100 * result.accuracy:.2f} %"
    return lines


def remarks(result: Result) -> list[str]:
    """The warnings, and a sentence on each detector and input that the tables leave out."""
    lines = [*result.warnings]
    lines += [f"{detector} was not run: {why}." for detector, why in result.not_run.items()]
    excluded = {name: table.excluded for name, table in result.tables.items()}
    for name, inputs in {**excluded, FIT: result.fit_excluded}.items():
        # Those that look like images and are not come first: they are the surprise.
        inputs = sorted(inputs, key=lambda each: each.position < 0)
        if inputs:
            listed = "; ".join(f"{each.id} ({each.reason})" for each in inputs[:_LISTED])
            more = f"; and {len(inputs) - _LISTED} more" if len(inputs) > _LISTED else ""
            lines.append(f"{name}: {len(inputs)} files were excluded: {listed}{more}.")
    return lines


def to_rich(result: Result) -> rich.table.Table:
    """The headline table for a terminal, metrics below each other to keep it narrow."""
    header, rows = headline_table(result, separator="\n")
    shown = rich.table.Table(show_lines=True)
    shown.add_column(header[0])
    shown.add_column("in %")
    for name in header[1:]:
        shown.add_column(rich.text.Text(printable(name)), justify="right")
    for detector, *cells in rows:
        shown.add_row(rich.text.Text(printable(detector)), "\n".join(HEADLINE), *cells)
    return shown


def to_text(result: Result) -> str:
    """The headline table, the data sets and what is left out, as plain text."""
    file = io.StringIO()
    # Wide enough for any table: text is not wrapped by whoever prints it.
    width = 40 + 14 * len(result.tables) + max(map(len, [*result.metrics, *result.not_run, ""]))
    rich.console.Console(file=file, width=width).print(to_rich(result))
    lines = map(printable, [*data_sets(result), *remarks(result)])
    return "\n".join([file.getvalue().rstrip(), *lines])


def to_html(result: Result) -> str:
    """The headline table, the data sets and what is left out, as HTML."""
    header, rows = headline_table(result)

    def row(tag: str, cells: Iterable[str]) -> str:
        shown = "".join(f"<{tag}>{html.escape(printable(cell))}</{tag}>" for cell in cells)
        return f"<tr>{shown}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    said = map(printable, data_sets(result) + remarks(result))
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in said)
    return (
        f"<table><caption>{html.escape(CAPTION)}</caption><thead>{row('th', header)}</thead>"
        f"<tbody>{body}</tbody></table><ul>{lines}</ul>"
    )


def to_markdown(table: Table, names: int = 1) -> str:
    """A table in GitHub's Markdown, the first columns of which hold names."""
    header = list(map(escape_markdown, table.header))
    aligned = [":---", *["---:"] * (len(header) - 1)]
    rows = [[*map(escape_markdown, row[:names]), *row[names:]] for row in table.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, aligned, *rows])


def summary(result: Result) -> str:
    """The whole report in Markdown."""
    sections = [
        "# Out-of-distribution detection",
        CAPTION,
        to_markdown(headline_table(result)),
        "\n".join(f"- {escape_markdown(line)}" for line in data_sets(result)),
        "\n".join(f"- {escape_markdown(line)}" for line in remarks(result)),
        "## All metrics",
        "In percent, with 95 % intervals (DeLong's for AUROC, bootstrap for the others).",
        to_markdown(full_table(result), names=2),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def to_dict(result: Result) -> dict[str, Any]:
    """All metrics and exclusions, as JSON."""
    return {
        "accuracy": result.accuracy,
        "inputs": {name: len(table.ids) for name, table in result.tables.items()},
        "excluded": {
            **{name: _list(table.excluded) for name, table in result.tables.items()},
            FIT: _list(result.fit_excluded),
        },
        "not_run": dict(result.not_run),
        "warnings": list(result.warnings),
        "metrics": {
            detector: {name: dataclasses.asdict(cell) for name, cell in cells.items()}
            for detector, cells in result.metrics.items()
        },
        "averages": {
            detector: averages(cells.values()) for detector, cells in result.metrics.items()
        },
    }


def _list(excluded: Sequence[Excluded]) -> list[dict[str, Any]]:
    """An entry for each file, with its position in the data set if it has one."""
    return [
        {name: value for name, value in each._asdict().items() if value != -1} for each in excluded
    ]
