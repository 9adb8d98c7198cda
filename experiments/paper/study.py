"""What the studies of the paper share: one evaluation, and its table beside the paper's figures."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

import gradnorm_jax as gj
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.evaluation.records import ID
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
    started = time.perf_counter()
    result = run_evaluate(dataclasses.replace(options, detectors=(detectors,)))
    seconds = time.perf_counter() - started
    names = [detector.name for detector in gj.parse_detectors(detectors)]
    text = describe(title, result, dict(zip(rows, names, strict=True)), published or {})
    total = sum(len(table.ids) for table in result.tables.values())
    text += (
        f"\n{total:,} images, {len(rows)} rows: {seconds:.0f} s, compiling included. What was "
        "evaluated, with its fingerprint, and by which versions: config.json.\n"
    )
    Path(options.out, "study.md").write_text(text, encoding="utf-8")
    Console().print(Markdown(text))


def describe(title: str, result: gj.Result, rows: Mapping[str, str], published: Published) -> str:
    """The table in Markdown: FPR95 and AUROC of each row and OOD set, with 95 % intervals.

    Where the paper has a figure and the sets are as large as its own, "reproduced" means that both
    its numbers lie within our intervals, "differs" that they do not.
    """
    sets = [name for name in result.tables if name != ID]
    lines = [
        f"# {title}",
        "",
        "FPR95 ↓ / AUROC ↑ in percent, with 95 % intervals.",
        "",
        f"| | {' | '.join(sets)} |",
        f"| :--- |{' ---: |' * len(sets)}",
    ]
    for row, detector in rows.items():
        cells = []
        for name in sets:
            if detector not in result.metrics:
                cells.append("not run here")
                continue
            metrics = result[detector, name]
            found = metrics.fpr_at_95_tpr_id_positive, metrics.auroc
            cell = " / ".join(map(_show, found))
            if paper := published.get((row, name)):
                verdict = _compare(found, paper) if _as_large(result, name) else "other data"
                cell += f"<br>paper {paper[0]:.2f} / {paper[1]:.2f}: {verdict}"
            cells.append(cell)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
