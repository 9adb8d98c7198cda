"""Rows about images, one printed as soon as it is known."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TextIO

from gradnorm_jax.text import printable, to_utf8

Format = Literal["table", "jsonl", "csv"]
Row = Mapping[str, Any]
Write = Callable[[Row], None]

_COLUMNS = {
    "number": ("image", "7"),
    "score": ("score", "12.6g"),
    "p_value": ("p-value", "9.3g"),
    "is_ood": ("", "<3"),
    "prediction": ("class", "5"),
    "drift_p_value": ("drift-p", "9.3g"),
    "file": ("file", ""),
}
"""Title and format of each column of a table, in order."""


def row_writer(form: Format, out: TextIO, names: Sequence[str]) -> Write:
    """A function that writes rows with entries of these names; headers are written at once."""
    return {"table": _table, "jsonl": _jsonl, "csv": _csv}[form](out, names)


def _table(out: TextIO, names: Sequence[str]) -> Write:
    columns = {name: column for name, column in _COLUMNS.items() if name in names}

    def pad(title: str, spec: str) -> str:
        width = spec.partition(".")[0]
        return title.ljust(3) if spec.startswith("<") else f"{title:>{width}}"

    print("  ".join(pad(*column) for column in columns.values()), file=out)

    def write(row: Row) -> None:
        shown = dict(row) | {
            "is_ood": "out" if row["is_ood"] else "in",
            "file": printable(row["file"]),
        }
        cells = (format(shown[name], spec) for name, (_, spec) in columns.items())
        print("  ".join(cells), file=out, flush=True)

    return write


def _jsonl(out: TextIO, names: Sequence[str]) -> Write:
    def write(row: Row) -> None:
        fields = _shorten(row) | {"file": to_utf8(row["file"])}
        print(json.dumps({name: fields[name] for name in names}), file=out, flush=True)

    return write


def _csv(out: TextIO, names: Sequence[str]) -> Write:
    rows = csv.DictWriter(out, names, lineterminator="\n")
    rows.writeheader()

    def write(row: Row) -> None:
        rows.writerow(_shorten(row) | {"file": printable(row["file"])})
        out.flush()

    return write


def _shorten(row: Row) -> dict[str, Any]:
    # Nine digits tell any two float32 numbers apart.
    return {
        name: float(f"{value:.9g}") if isinstance(value, float) else value
        for name, value in row.items()
    }
