"""The results for people: tables in the terminal and in Markdown, and score histograms."""

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import IO, NamedTuple

import numpy as np
import rich.table

from gradnorm_jax.evaluation.evaluate import ID, Evaluation
from gradnorm_jax.metrics import Estimate, Metrics

HEADLINE = {
    "FPR95 ↓": "fpr_at_95_tpr_id_positive",
    "AUROC ↑": "auroc",
    "AUPR ↑": "aupr_in",
}
FIGURES = {
    "AUROC": "auroc",
    "AUPR-in": "aupr_in",
    "AUPR-out": "aupr_out",
    "FPR95 (ID positive)": "fpr_at_95_tpr_id_positive",
    "FPR95 (OOD positive)": "fpr_at_95_tpr_ood_positive",
    "Detection error": "detection_error",
}


class Table(NamedTuple):
    """Text cells under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def averages(cells: Iterable[Metrics]) -> dict[str, float]:
    """The mean of each figure over OOD sets, by its name in `Metrics`."""
    cells = list(cells)
    names = [field.name for field in dataclasses.fields(Metrics)]
    return {name: fmean(getattr(cell, name).value for cell in cells) for name in names}


def headline_table(evaluation: Evaluation, separator: str = " / ") -> Table:
    """Detectors by OOD sets and their average, as in Table 1 of the paper, in percent."""

    def show(cells: Iterable[Metrics]) -> str:
        values = averages(cells)
        return separator.join(f"{100 * values[name]:.2f}" for name in HEADLINE.values())

    sets = [name for name in evaluation.tables if name != ID]
    rows = [
        [detector, *(show([cells[name]]) for name in sets), show(cells.values())]
        for detector, cells in evaluation.metrics.items()
    ]
    rows += [[detector, *["not run"] * (len(sets) + 1)] for detector in evaluation.not_run]
    return Table(["Detector", *sets, "Average"], rows)


def full_table(evaluation: Evaluation) -> Table:
    """Every figure of every detector on every OOD set with its interval, in percent."""

    def show(estimate: Estimate) -> str:
        value, low, high = (100 * x for x in dataclasses.astuple(estimate))
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    rows = [
        [detector, name, *(show(getattr(cell, figure)) for figure in FIGURES.values())]
        for detector, cells in evaluation.metrics.items()
        for name, cell in cells.items()
    ]
    return Table(["Detector", "OOD set", *FIGURES], rows)


def remarks(evaluation: Evaluation) -> list[str]:
    """A sentence on each detector and image that the tables leave out."""
    lines = [f"{detector} was not run: {why}." for detector, why in evaluation.not_run.items()]
    excluded = {name: table.excluded for name, table in evaluation.tables.items()}
    for source, images in {**excluded, "fit": evaluation.fit_excluded}.items():
        if images:
            listed = "; ".join(f"{image.id} ({image.reason})" for image in images[:5])
            more = f"; and {len(images) - 5} more" if len(images) > 5 else ""
            lines.append(f"{source}: {len(images)} files were excluded: {listed}{more}.")
    return lines


def to_rich(evaluation: Evaluation) -> rich.table.Table:
    """The headline table for a terminal, figures below each other to keep it narrow."""
    header, rows = headline_table(evaluation, separator="\n")
    shown = rich.table.Table(show_lines=True)
    shown.add_column(header[0])
    shown.add_column("in %")
    for name in header[1:]:
        shown.add_column(name, justify="right")
    for detector, *cells in rows:
        shown.add_row(detector, "\n".join(HEADLINE), *cells)
    return shown


def to_markdown(table: Table) -> str:
    """A table in GitHub's Markdown."""
    aligned = [":---", *["---:"] * (len(table.header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [table.header, aligned, *table.rows])


def summary(evaluation: Evaluation) -> str:
    """The whole report in Markdown."""
    lines = [f"- {name}: {len(t.ids)} images" for name, t in evaluation.tables.items()]
    if evaluation.accuracy is not None:
        lines[0] += f", top-1 accuracy {100 * evaluation.accuracy:.2f} %"
    sections = [
        "# Out-of-distribution detection",
        f"Each cell: {' / '.join(HEADLINE)}, in percent. FPR95 takes ID as the positive class, "
        "AUPR likewise; higher scores mean more in-distribution.",
        to_markdown(headline_table(evaluation)),
        "\n".join(lines),
        "\n".join(f"- {line}" for line in remarks(evaluation)),
        "## All figures",
        "In percent, with 95 % intervals (DeLong's for AUROC, bootstrap for the others).",
        to_markdown(full_table(evaluation)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def plot_histograms(evaluation: Evaluation, file: IO[bytes]) -> None:
    """Draws a grid of histograms, detectors by OOD sets, ID scores over OOD scores, as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    sets = [name for name in evaluation.tables if name != ID]
    size = (4 * len(sets), 2.5 * len(evaluation.metrics))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(evaluation.metrics), len(sets), squeeze=False)
    for row, (detector, cells) in zip(axes, evaluation.metrics.items(), strict=True):
        for axis, name in zip(row, sets, strict=True):
            both = {key: evaluation.tables[key].scores[detector] for key in (ID, name)}
            edges = np.histogram_bin_edges(np.concatenate(list(both.values())), bins=50)
            for label, scores in both.items():
                axis.hist(scores, edges, density=True, alpha=0.6, label=label)
            auroc = cells[name].auroc.value
            axis.set_title(f"{detector}, AUROC {100 * auroc:.2f} %", fontsize="medium")
            axis.set_yticks([])
            axis.locator_params(axis="x", nbins=4)
            axis.legend(loc="upper left", fontsize="small")
    figure.savefig(file, format="png", dpi=120)
