"""The metrics of runs as one long table in CSV, a row for each number."""

import csv
import dataclasses
import io
from collections.abc import Iterator

from gradnorm_jax.evaluation.records import ID
from gradnorm_jax.reporting.side_by_side import Difference, Runs, differences, match_inputs
from gradnorm_jax.text import printable

_HEADER = (
    *("run", "detector", "ood_set", "id_inputs", "ood_inputs", "metric"),
    *("value", "low", "high", "is_best"),
    *("minus_first_run", "minus_first_run_low", "minus_first_run_high", "holm_p_value"),
)
_FORMULA = ("=", "+", "-", "@")


def to_csv(runs: Runs) -> str:
    """The table: fractions, not percent, with 95 % intervals.

    `is_best` says whether a metric is the best of its run or not significantly worse, where that
    was tested; the last columns compare a run with the first one.
    """
    found = differences(runs, match_inputs(runs)[0]) if len(runs) > 1 else []
    by_cell = {(each.run, each.detector, each.ood_set, each.metric): each for each in found}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_HEADER)
    writer.writerows(_rows(runs, by_cell))
    return file.getvalue()


def _rows(
    runs: Runs, by_cell: dict[tuple[str, str, str, str], Difference]
) -> Iterator[list[object]]:
    for run, saved in runs.items():
        sizes = {name: len(table.ids) for name, table in saved.result.tables.items()}
        for detector, cells in saved.result.metrics.items():
            for name, cell in cells.items():
                for metric, estimate in vars(cell).items():
                    best = saved.result.best.get(name, {}).get(metric)
                    leads = "" if best is None else detector in best.leaders()
                    yield [
                        *map(_cell, (run, detector, name)),
                        *(sizes[ID], sizes[name], metric),
                        *dataclasses.astuple(estimate),
                        leads,
                        *_differs(by_cell.get((run, detector, name, metric))),
                    ]


def _differs(difference: Difference | None) -> list[object]:
    if difference is None:
        return [""] * 4
    found = difference.comparison
    return [found.difference, found.low, found.high, difference.holm_p_value]


def _cell(text: str) -> str:
    # Spreadsheets would compute what begins so.
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text
