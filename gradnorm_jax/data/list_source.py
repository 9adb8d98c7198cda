"""Image files named in a list: a CSV file, or the lists of OpenOOD."""

import collections
import csv
import dataclasses
import itertools
import os
import posixpath
import re
from pathlib import Path

from gradnorm_jax.data.folder_source import FileSource, some
from gradnorm_jax.data.stream import UNKNOWN

_COLUMNS = {"file": "file", "files": "file", "label": "label", "labels": "label"}


def csv_source(path: str | os.PathLike[str]) -> FileSource:
    """The images listed in a CSV file, in its order.

    It has a header and a column `file`, and may have a column `label` of integers: classes from 0,
    or -1 for unknown. `File`, `files` and `labels` are these columns too, and spaces after commas
    do not count. Other columns are ignored. Files are relative to the folder that has the CSV
    file's name without its ending (`id_val/` beside `id_val.csv`) if the first of them is there,
    otherwise to the folder that the CSV file is in.

    Raises:
        FileNotFoundError: the CSV file or images that it lists do not exist.
        ValueError: it is not such a CSV file, lists no image or one twice, or a label is not an
            integer of at least -1.
    """
    path = _existing(path, "CSV file")
    source = _listed_source(path, _read_csv(path))
    return dataclasses.replace(source, spec=f"csv:{path.resolve()}")


def list_source(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> FileSource:
    """The images of a list as OpenOOD and OpenMMLab write them, in its order.

    Each line is a file and, after the last space, its class: `ninco/amphiuma/0001.jpg -1`. This is
    how OpenOOD gives NINCO, SSB-hard and OpenImage-O; their files are relative to its folder
    `images_largescale`, which lies elsewhere and has to be named.

    Args:
        path: the text file.
        root: the folder that files are relative to; by default as for `csv_source`.

    Raises:
        FileNotFoundError: the list or images in it do not exist.
        ValueError: it is not such a list, lists no image or one twice, or a label is not an integer
            of at least -1.
    """
    path = _existing(path, "list")
    remedy = "; name the folder that it is relative to, as in list:FILE@FOLDER"
    source = _listed_source(path, _read_list(path), root, remedy)
    spec = f"list:{path.resolve()}@{source.root.resolve()}"
    return dataclasses.replace(source, spec=spec)


def _existing(path: str | os.PathLike[str], what: str) -> Path:
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist")
    return path


def _listed_source(
    path: Path,
    rows: list[tuple[str, int]],
    root: str | os.PathLike[str] | None = None,
    remedy: str = "",
) -> FileSource:
    if not rows:
        raise ValueError(f"{path} lists no image")
    files, labels = zip(*rows, strict=True)
    ids = tuple(posixpath.normpath(file) for file in files)
    beside = path.with_suffix("")
    if root is not None:
        root = Path(os.path.expanduser(root))
    else:
        root = beside if (beside / ids[0]).is_file() else path.parent
    # By whatever spelling.
    places = collections.Counter(os.path.normpath(root / file) for file in ids)
    twice = [os.path.relpath(place, root) for place, count in places.items() if count > 1]
    if twice:
        raise ValueError(f"{path} lists {some(twice)} more than once: list every file once")
    missing = [file for file in ids if not (root / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lists files that do not exist in {root}, {len(missing)} of {len(ids)}: "
            f"{some(missing)}{remedy}"
        )
    return FileSource(path.stem, root, ids, labels)


def _read_csv(path: Path) -> list[tuple[str, int]]:
    """File and label of each row."""
    try:
        # Spreadsheets write a byte order mark, which would become part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, skipinitialspace=True)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    columns = [_COLUMNS.get(name.strip().lower(), "") for name in header]
    if "file" not in columns:
        raise ValueError(
            f"{path} has no column 'file' but {', '.join(map(repr, header)) or 'no columns'}: its "
            "first line must read file,label or file"
        )
    if columns.count("file") > 1 or columns.count("label") > 1:
        raise ValueError(
            f"{path} has two columns that may be 'file' or 'label', "
            f"{', '.join(map(repr, header))}: remove one"
        )
    for line, row in rows:
        if len(row) > len(columns):
            raise ValueError(
                f"{path}, line {line} has {len(row)} entries, but there are {len(columns)} "
                "columns: put quotes around a name with a comma"
            )
    named = [(line, dict(itertools.zip_longest(columns, row))) for line, row in rows]
    return [
        (
            _check_file(row["file"], path, line),
            _to_label(row.get("label", str(UNKNOWN)), path, line),
        )
        for line, row in named
    ]


def _read_list(path: Path) -> list[tuple[str, int]]:
    """File and label of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        file, *label = line.strip().rsplit(maxsplit=1) or [""]
        if number == 1 and "," in line and label and not _is_integer(label[0]):
            raise ValueError(f"{path} seems to be a CSV file: give it as csv:{path}")
        if file:
            rows.append((file, _to_label(label[0] if label else None, path, number)))
    return rows


def _check_file(file: str | None, path: Path, line: int) -> str:
    if not file:
        raise ValueError(f"{path}, line {line}: the column 'file' is empty")
    return file


def _to_label(text: str | None, path: Path, line: int) -> int:
    label = int(text) if text is not None and _is_integer(text) else UNKNOWN - 1
    if not UNKNOWN <= label < 2**31:
        raise ValueError(
            f"{path}, line {line}: the label {text!r} is not a class number 0, 1, ... or -1 for "
            "unknown"
        )
    return label


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", text) is not None
