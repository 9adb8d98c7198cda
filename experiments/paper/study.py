"""What the studies of the paper share: evaluations, and a table beside the paper's figures."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markdown import Markdown

import gradnorm_jax as gj
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.evaluation.records import ID
from gradnorm_jax.evaluation.storage import open_folder
from gradnorm_jax.metrics import Estimate

Published = Mapping[tuple[str, str], tuple[float, float]]
"""FPR95 and AUROC, in percent, by row and OOD set."""

PAPER_SIZES = {
    ID: 50_000,
    "iNaturalist": 10_000,
    "SUN": 10_000,
    "Places": 10_000,
    "Textures": 5_640,
}
"""How many images the paper's sets have: with fewer or more, a set is another one."""


class Row(NamedTuple):
    """A row of a study's table.

    Attributes:
        name: what it is called.
        result: the evaluation that it is from.
        detector: by which name it is there.
    """

    name: str
    result: gj.Result
    detector: str


def run_study(
    title: str,
    options: EvaluateOptions,
    rows: Mapping[str, str],
    published: Published | None = None,
) -> None:
    """Evaluates a detector for each row, in one pass, and writes `study.md` into `options.out`.

    Args:
        title: of the table.
        options: model, data and `out`.
        rows: what each row is called, and its detector, as for `gradnorm-jax evaluate`.
        published: the paper's figures.
    """
    detectors = tuple(rows.values())
    result, told = evaluate_timed(dataclasses.replace(options, detectors=(detectors,)))
    names = [detector.name for detector in gj.parse_detectors(detectors)]
    table = [Row(row, result, name) for row, name in zip(rows, names, strict=True)]
    write_study(options.out, describe(title, table, published), [told])


def evaluate_timed(options: EvaluateOptions) -> tuple[gj.Result, str]:
    """The evaluation, and a line on what it was of and what it took."""
    started = time.perf_counter()
    result = run_evaluate(options)
    seconds = time.perf_counter() - started
    told = f"{sum(len(table.ids) for table in result.tables.values()):,} images, "
    if result.accuracy is not None:
        told += f"top-1 {100 * result.accuracy:.2f} %, "
    return result, told + f"{seconds:.0f} s, compiling included."


def write_study(out: str | Path, table: str, notes: Sequence[str]) -> None:
    """Writes and prints `study.md`: a table, and a line on each evaluation that it is from."""
    facts = "What was evaluated, with its fingerprint, and by which versions: config.json."
    text = "\n\n".join([table.rstrip(), *notes, facts]) + "\n"
    open_folder(out).write("study.md", text.encode())
    Console().print(Markdown(text))


def describe(title: str, rows: Sequence[Row], published: Published | None = None) -> str:
    """The table in Markdown: FPR95 and AUROC of each row and OOD set, with 95 % intervals.

    Where the paper has a figure and the sets are as large as its own, "reproduced" means that both
    its numbers lie within our intervals, "differs" that they do not.
    """
    sets = [name for name in rows[0].result.tables if name != ID]
    lines = [
        f"# {title}",
        "",
        "FPR95 ↓ / AUROC ↑ in percent, ID positive, with 95 % intervals.",
        "",
        f"| | {' | '.join(sets)} |",
        f"| :--- |{' ---: |' * len(sets)}",
    ]
    for row in rows:
        cells = [_cell(row, name, (published or {}).get((row.name, name))) for name in sets]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, name: str, paper: tuple[float, float] | None) -> str:
    if row.detector not in row.result.metrics:
        return "not run here"
    metrics = row.result[row.detector, name]
    found = metrics.fpr_at_95_tpr_id_positive, metrics.auroc
    cell = " / ".join(map(_show, found))
    if paper is None:
        return cell
    verdict = _compare(found, paper) if _as_large(row.result, name) else "other data"
    return f"{cell}<br>paper {paper[0]:.2f} / {paper[1]:.2f}: {verdict}"


def _show(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in dataclasses.astuple(estimate))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _compare(found: tuple[Estimate, Estimate], paper: tuple[float, float]) -> str:
    inside = all(
        100 * estimate.low <= figure <= 100 * estimate.high
        for estimate, figure in zip(found, paper, strict=True)
    )
    return "reproduced" if inside else "differs"


def _as_large(result: gj.Result, name: str) -> bool:
    return all(len(result.tables[each].ids) == PAPER_SIZES.get(each) for each in (ID, name))
