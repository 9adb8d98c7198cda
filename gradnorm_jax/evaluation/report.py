"""The result of an evaluation for terminal, notebook, Markdown and programs."""

import dataclasses
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import FIT
from gradnorm_jax.evaluation.result import HEADLINE, Result
from gradnorm_jax.evaluation.tables import (
    LEGEND,
    averages,
    full_table,
    headline_table,
    to_markdown,
)
from gradnorm_jax.metrics import Best
from gradnorm_jax.text import escape_markdown, printable

CAPTION = (
    f"Each cell: {' / '.join(HEADLINE)}, in percent. FPR95 takes ID as the positive class, AUPR "
    "likewise; higher scores mean more in-distribution."
)
_LISTED = 5
_TEXT_WIDTH = 100
_UNBOUNDED = 10_000


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


def to_rich(result: Result) -> rich.console.RenderableType:
    """The headline table for a terminal; where it is too narrow for that, one for each metric."""
    return _Headline(result)


class _Headline:
    def __init__(self, result: Result) -> None:
        self.result = result
        self.whole = _rich_table(result, HEADLINE)
        self.by_metric = [_rich_table(result, {name: HEADLINE[name]}) for name in HEADLINE]

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[rich.console.RenderableType]:
        fits = _width(console, self.whole) <= options.max_width
        yield from [self.whole] if fits else self.by_metric
        if self.result.best:
            yield f"* {LEGEND}"


def _rich_table(result: Result, metrics: Mapping[str, str]) -> rich.table.Table:
    def mark(value: str, leads: bool) -> str:
        # In front, where it does not disturb the column of digits.
        return f"[bold]*{value}[/bold]" if leads else f" {value}"

    table = headline_table(result, mark, " ", metrics.values())
    first, *header = table.header
    title = f"{' / '.join(metrics)}, in percent"
    shown = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
    )
    shown.add_column(first, overflow="fold")
    for name in header:
        shown.add_column(rich.text.Text(printable(name)), justify="right", overflow="fold")
    for detector, *cells in table.rows:
        shown.add_row(rich.text.Text(printable(detector)), *cells)
    return shown


def _width(console: rich.console.Console, table: rich.table.Table) -> int:
    unbounded = console.options.update(width=_UNBOUNDED)
    return console.measure(table, options=unbounded).maximum


def to_text(result: Result) -> str:
    """The headline table, the data sets and what is left out, as plain text."""
    file, headline = io.StringIO(), _Headline(result)
    console = rich.console.Console(file=file)
    # Wide enough for every line: text is not wrapped by whoever prints it.
    console.width = max(_TEXT_WIDTH, *(_width(console, each) for each in headline.by_metric))
    console.print(headline)
    lines = map(printable, [*data_sets(result), *remarks(result)])
    return "\n".join([*(line.rstrip() for line in file.getvalue().splitlines()), *lines])


def to_html(result: Result) -> str:
    """The headline table, the data sets and what is left out, as HTML."""

    def row(tag: str, cells: Iterable[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    def text(line: str) -> str:
        return html.escape(printable(line))

    table = headline_table(result, lambda value, leads: f"<b>{value}</b>" if leads else value)
    body = "".join(row("td", [text(detector), *cells]) for detector, *cells in table.rows)
    lines = "".join(f"<li>{text(line)}</li>" for line in data_sets(result) + remarks(result))
    return (
        f"<table><caption>{text(_caption(result))}</caption>"
        f"<thead>{row('th', map(text, table.header))}</thead><tbody>{body}</tbody></table>"
        f"<ul>{lines}</ul>"
    )


def _caption(result: Result) -> str:
    return f"{CAPTION} In bold: {LEGEND}" if result.best else CAPTION


def summary(result: Result) -> str:
    """The whole report in Markdown."""
    sections = [
        "# Out-of-distribution detection",
        _caption(result),
        to_markdown(headline_table(result, lambda text, leads: f"**{text}**" if leads else text)),
        "\n".join(f"- {escape_markdown(line)}" for line in data_sets(result)),
        "\n".join(f"- {escape_markdown(line)}" for line in remarks(result)),
        "## All metrics",
        "In percent, with 95 % intervals (bootstrap for FPR95, the jackknife's variance for the "
        "others, which is DeLong's for AUROC).",
        to_markdown(full_table(result)),
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
