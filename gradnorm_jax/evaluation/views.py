"""The headline of an evaluation as a terminal and a notebook show it."""

import html
import io
from collections.abc import Iterable, Iterator, Mapping

import rich.box
import rich.console
import rich.table
import rich.text

from gradnorm_jax.evaluation.tables import HEADLINE, LEGEND, Headline, headline_table
from gradnorm_jax.text import printable

_CAPTION = (
    f"Each cell: {' / '.join(HEADLINE)}, in percent. FPR95 takes ID as the positive class, AUPR "
    "likewise; higher scores mean more in-distribution."
)
_TEXT_WIDTH = 100
_UNBOUNDED = 10_000


def to_rich(headline: Headline) -> rich.console.RenderableType:
    """The headline table for a terminal; where it is too narrow for that, one for each metric."""
    return _Tables(headline)


class _Tables:
    def __init__(self, headline: Headline) -> None:
        self.headline = headline
        self.whole = _rich_table(headline, HEADLINE)
        self.by_metric = [_rich_table(headline, {name: HEADLINE[name]}) for name in HEADLINE]

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[rich.console.RenderableType]:
        fits = _width(console, self.whole) <= options.max_width
        yield from [self.whole] if fits else self.by_metric
        if self.headline.best:
            yield f"* {LEGEND}"


def _rich_table(headline: Headline, metrics: Mapping[str, str]) -> rich.table.Table:
    def mark(value: str, leads: bool) -> str:
        # In front, where it does not disturb the column of digits.
        return f"[bold]*{value}[/bold]" if leads else f" {value}"

    table = headline_table(headline, mark, " ", metrics.values())
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


def to_text(headline: Headline, lines: Iterable[str]) -> str:
    """The headline table and lines under it, as plain text."""
    file, shown = io.StringIO(), _Tables(headline)
    console = rich.console.Console(file=file)
    # Wide enough for every line: text is not wrapped by whoever prints it.
    console.width = max(_TEXT_WIDTH, *(_width(console, each) for each in shown.by_metric))
    console.print(shown)
    printed = (line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join([*printed, *map(printable, lines)])


def to_html(headline: Headline, lines: Iterable[str]) -> str:
    """The headline table and lines under it, as HTML."""

    def row(tag: str, cells: Iterable[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    def text(line: str) -> str:
        return html.escape(printable(line))

    table = headline_table(headline, lambda value, leads: f"<b>{value}</b>" if leads else value)
    body = "".join(row("td", [text(detector), *cells]) for detector, *cells in table.rows)
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return (
        f"<table><caption>{text(caption(headline))}</caption>"
        f"<thead>{row('th', map(text, table.header))}</thead><tbody>{body}</tbody></table>"
        f"<ul>{items}</ul>"
    )


def caption(headline: Headline) -> str:
    """What the headline table shows."""
    return f"{_CAPTION} In bold: {LEGEND}" if headline.best else _CAPTION
