"""The tables of a report in LaTeX, for papers; they need the package booktabs."""

import itertools
import re
from collections.abc import Iterable, Sequence

from gradnorm_jax.evaluation.tables import Table
from gradnorm_jax.reporting.blocks import Chapter
from gradnorm_jax.text import printable

_ESCAPED = str.maketrans(
    {
        **{character: f"\\{character}" for character in "{}$&#_%"},
        # At the start of a row these two would be an option of the line end before it.
        **{character: f"{{{character}}}" for character in "[*"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
    }
)
_MINUS = re.compile(r"-(?=\d)")


def escape_latex(text: str) -> str:
    """`printable` text that LaTeX typesets as it is, but for ligatures."""
    return printable(text).translate(_ESCAPED)


def latex(chapters: Sequence[Chapter]) -> str:
    """The tables of results, each a `table*` with its caption."""
    parts = ["% \\usepackage{booktabs}; the quotation mark \\textquotedbl needs the encoding T1."]
    for chapter in chapters:
        for section in chapter.sections:
            if section.for_papers:
                text = " ".join(block for block in section.blocks if isinstance(block, str))
                parts += [
                    _table(block, f"{chapter.title}. {block.caption or text}")
                    for block in section.blocks
                    if isinstance(block, Table)
                ]
    return "\n\n".join(parts) + "\n"


def _table(table: Table, caption: str) -> str:
    numbers = "r" * (len(table.header) - table.names)
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * table.names}{numbers}}}",
        r"\toprule",
        *_groups(table),
        _row(map(escape_latex, table.header)),
        r"\midrule",
    ]
    for i, row in enumerate(table.rows):
        cells = list(map(escape_latex, row))
        cells[table.names :] = [_MINUS.sub("$-$", cell) for cell in cells[table.names :]]
        lines.append(
            _row(
                rf"\textbf{{{cell}}}" if (i, j) in table.marked else cell
                for j, cell in enumerate(cells)
            )
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"])


def _groups(table: Table) -> list[str]:
    if not table.groups:
        return []
    titles = [
        rf"\multicolumn{{{size}}}{{c}}{{{escape_latex(title)}}}" for title, size in table.groups
    ]
    ends = itertools.accumulate((size for _, size in table.groups), initial=table.names)
    rules = [rf"\cmidrule(lr){{{start + 1}-{end}}}" for start, end in itertools.pairwise(ends)]
    return [_row([*[""] * table.names, *titles]), " ".join(rules)]


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
