"""The files that people and programs read after a run."""

import dataclasses
import io
import logging
from typing import Any

from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.evaluate import FIT, Evaluation
from gradnorm_jax.evaluation.folder import Folder, to_json
from gradnorm_jax.evaluation.table import Excluded


def write_results(folder: Folder, evaluation: Evaluation) -> None:
    """Writes figures (JSON), the report (Markdown) and histograms (PNG)."""
    folder.write("metrics.json", to_json(_figures(evaluation)))
    folder.write("report.md", report.summary(evaluation).encode())
    histograms = io.BytesIO()
    try:
        report.plot_histograms(evaluation, histograms)
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning(
            "histograms.png is left out, for want of matplotlib: pip install 'gradnorm-jax[plots]'"
        )
    else:
        folder.write("histograms.png", histograms.getvalue())


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": evaluation.accuracy,
        "images": {name: len(table.ids) for name, table in evaluation.tables.items()},
        "excluded": {
            **{name: _list(table.excluded) for name, table in evaluation.tables.items()},
            FIT: _list(evaluation.fit_excluded),
        },
        "not_run": dict(evaluation.not_run),
        "metrics": {
            detector: {name: dataclasses.asdict(cell) for name, cell in cells.items()}
            for detector, cells in evaluation.metrics.items()
        },
        "averages": {
            detector: report.averages(cells.values())
            for detector, cells in evaluation.metrics.items()
        },
    }


def _list(excluded: list[Excluded]) -> list[dict[str, Any]]:
    """An entry for each file, with its position in the source if it has one."""
    return [
        {name: value for name, value in each._asdict().items() if value != -1} for each in excluded
    ]
