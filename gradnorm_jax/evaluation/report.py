"""The result of an evaluation as files: Markdown, JSON, histograms."""

import dataclasses
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradnorm_jax import plots
from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import FIT
from gradnorm_jax.evaluation.result import Result, data_sets, remarks
from gradnorm_jax.evaluation.storage import Folder, to_json
from gradnorm_jax.evaluation.tables import averages, full_table, headline_table, to_markdown
from gradnorm_jax.evaluation.views import caption
from gradnorm_jax.metrics import Best
from gradnorm_jax.text import escape_markdown


def write_report(folder: Folder, result: Result) -> None:
    """Writes metrics (JSON), the report (Markdown) and histograms (PNG)."""
    folder.write("metrics.json", to_json(to_dict(result)))
    folder.write("report.md", summary(result).encode())
    try:
        figure = plots.histogram_grid(
            {detector: _scores_by_set(result, detector) for detector in result.metrics},
            titles={
                (detector, name): f"{detector}, AUROC {100 * cell.auroc.value:.2f} %"
                for detector, cells in result.metrics.items()
                for name, cell in cells.items()
            },
        )
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning(
            "histograms.png is left out because matplotlib is not installed: "
            "pip install 'gradnorm-jax[plots]'"
        )
        return
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    folder.write("histograms.png", image.getvalue())


def _scores_by_set(result: Result, detector: str) -> dict[str, np.ndarray]:
    return {name: table.scores[detector] for name, table in result.tables.items()}


def summary(result: Result) -> str:
    """The whole report in Markdown."""
    sections = [
        "# Out-of-distribution detection",
        caption(result.headline),
        to_markdown(headline_table(result.headline, _mark)),
        "\n".join(f"- {escape_markdown(line)}" for line in data_sets(result)),
        "\n".join(f"- {escape_markdown(line)}" for line in remarks(result)),
        "## All metrics",
        "In percent, with 95 % intervals (bootstrap for FPR95, the jackknife's variance for the "
        "others, which is DeLong's for AUROC).",
        to_markdown(full_table(result.metrics)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _mark(value: str, leads: bool) -> str:
    return f"**{value}**" if leads else value


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
        "best": {
            name: {metric: _best(best) for metric, best in by_metric.items()}
            for name, by_metric in result.best.items()
        },
    }


def _best(best: Best) -> dict[str, Any]:
    """The best detector by a metric on a set, and its metric less that of each other."""
    against = {
        detector: dataclasses.asdict(comparison) | {"holm_p_value": best.adjusted[detector]}
        for detector, comparison in best.comparisons.items()
    }
    return {"detector": best.detector, "against": against}


def _list(excluded: Sequence[Excluded]) -> list[dict[str, Any]]:
    """An entry for each file, with its position in the data set if it has one."""
    return [
        {name: value for name, value in each._asdict().items() if value != -1} for each in excluded
    ]
