"""Where images come from: anything that gives the i-th encoded image, its id and its label.

A source is a `grain.RandomAccessDataSource` of `Record`. Folders and CSV files are read here; a
prepared data set fits as well, as long as it hands out the encoded bytes.
"""

import collections
import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple, Protocol

IMAGE_EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
UNKNOWN = -1
"""The label of an image whose class is not known."""


class Record(NamedTuple):
    """One image of a source.

    Attributes:
        id: identifies it within the source, the same in every run.
        label: its class, 0, 1, ...; -1 if unknown.
        data: the contents of the image file.
    """

    id: str
    label: int
    data: bytes


class Source(Protocol):
    """A finite sequence of records with random access, picklable for worker processes."""

    @property
    def name(self) -> str:
        """A short name for messages and results."""

    @property
    def ignored(self) -> Sequence[str]:
        """The files that were passed over because their names are not those of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files below one folder; a `Source`.

    Attributes:
        name: a short name for messages and results.
        root: the folder.
        ids: the files' paths relative to it, with forward slashes.
        labels: their classes, -1 where unknown.
        ignored: the files that were passed over because their names are not those of images.
    """

    name: str
    root: Path
    ids: Sequence[str] = dataclasses.field(repr=False)
    labels: Sequence[int] = dataclasses.field(repr=False)
    ignored: Sequence[str] = dataclasses.field(default=(), repr=False)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        """Reads the file at position `index`; OSError if that fails."""
        file = self.ids[index]
        return Record(file, self.labels[index], (self.root / file).read_bytes())


def open_source(spec: str) -> Source:
    """Opens a source by the way users name one.

    Args:
        spec: `folder:PATH` (see `folder_source`), `csv:PATH` (see `csv_source`), or a bare path: of
            a CSV file if it ends in `.csv`, of a folder otherwise.

    Raises:
        ValueError: an unknown kind of source, or what the kind's own function raises.
        FileNotFoundError: nothing is there.
    """
    scheme, colon, path = spec.partition(":")
    if colon and scheme in _OPENERS:
        return _OPENERS[scheme](path)
    # One letter before the colon is a drive of Windows.
    if colon and len(scheme) > 1 and not Path(spec).exists():
        kinds = ", ".join(f"{kind}:PATH" for kind in _OPENERS)
        raise ValueError(
            f"unknown kind of source {scheme!r} in {spec!r}: use {kinds} or the path of a folder"
        )
    return csv_source(spec) if spec.lower().endswith(".csv") else folder_source(spec)


def folder_source(path: str | os.PathLike[str]) -> FileSource:
    """All images in a folder and its subfolders, in the order of their relative paths.

    Files whose names do not end in one of `IMAGE_EXTENSIONS`, and hidden ones (names that start
    with a dot, and all below a hidden folder), are listed in `ignored`.

    Labels are the positions of the class folders, the first level of subfolders, in sorted order;
    one without images counts too, so that it does not shift the others. Labels are unknown when
    there are fewer than two such folders, or when images lie beside them: guessing would yield a
    wrong accuracy where none can be known. Give labels of a flat folder by `csv_source`; a CSV file
    beside the folder is not picked up by itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, holds no image, holds one whose name is not UTF-8, or links
            back to itself.
        OSError: a subfolder cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"the image folder {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give a folder of images, or csv:PATH for a list")
    files = sorted(_relative_files(root))
    ids = tuple(file for file in files if _is_image(file))
    if not ids:
        raise ValueError(
            f"the folder {root} holds no image: none of its {len(files)} files has a name ending "
            f"in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    unreadable = [ascii(file) for file in ids if not _is_utf8(file)]
    if unreadable:
        raise ValueError(f"{root} holds names that are not UTF-8: rename {_some(unreadable)}")
    ignored = tuple(file for file in files if not _is_image(file))
    return FileSource(root.resolve().name, root, ids, _folder_labels(root, ids), ignored)


def csv_source(path: str | os.PathLike[str]) -> FileSource:
    """The images listed in a CSV file, in its order.

    It has a header and a column `file`, and may have a column `label` of integers: classes from 0,
    or -1 for unknown. Other columns are ignored. Files are relative to the folder that has the CSV
    file's name without its ending (`id_val/` beside `id_val.csv`) if the first of them is there,
    otherwise to the folder that the CSV file is in.

    Raises:
        FileNotFoundError: the CSV file or images that it lists do not exist.
        ValueError: it is not such a CSV file, lists no image or one twice, or a label is not an
            integer of at least -1.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the CSV file {path} does not exist")
    files, labels = zip(*_read_rows(path), strict=True)
    ids = tuple(PurePosixPath(file).as_posix() for file in files)
    twice = [file for file, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{path} lists {_some(twice)} more than once: list every file once")
    beside = path.with_suffix("")
    root = beside if (beside / ids[0]).is_file() else path.parent
    missing = [file for file in ids if not (root / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lists files that do not exist in {root}, {len(missing)} of {len(ids)}: "
            f"{_some(missing)}"
        )
    return FileSource(path.stem, root, ids, labels)


_OPENERS: dict[str, Callable[[str], Source]] = {"folder": folder_source, "csv": csv_source}


def _relative_files(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        # By default os.walk passes over folders that it cannot read.
        raise error

    for folder, _, names in os.walk(root, onerror=fail, followlinks=True):
        if os.path.islink(folder) and _is_inside_itself(Path(folder)):
            raise ValueError(f"{folder} links back to a folder that holds it: remove the link")
        below = PurePath(folder).relative_to(root)
        yield from ((below / name).as_posix() for name in names)


def _is_inside_itself(folder: Path) -> bool:
    # Followed, such a link would list every image over and over.
    return any(parent.resolve() == folder.resolve() for parent in folder.parents)


def _is_image(file: str) -> bool:
    path = PurePosixPath(file)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not hidden


def _is_utf8(file: str) -> bool:
    # Python stands in lone surrogates for bytes that are not; no file of results could hold them.
    return not any("\ud800" <= character <= "\udfff" for character in file)


def _folder_labels(root: Path, ids: Sequence[str]) -> tuple[int, ...]:
    folders = sorted(x.name for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))
    if len(folders) < 2 or any("/" not in file for file in ids):
        return (UNKNOWN,) * len(ids)
    classes = {folder: label for label, folder in enumerate(folders)}
    return tuple(classes[file.partition("/")[0]] for file in ids)


def _read_rows(path: Path) -> list[tuple[str, int]]:
    """File and label of each row."""
    try:
        # Spreadsheets write a byte order mark, which would become part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            columns = reader.fieldnames or ()
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if "file" not in columns:
        raise ValueError(
            f"{path} has no column 'file' but {', '.join(map(repr, columns)) or 'no columns'}: its "
            "first line must read file,label or file"
        )
    if not rows:
        raise ValueError(f"{path} lists no image")
    return [
        (_read_file(row["file"], path, line), _read_label(row, path, line)) for line, row in rows
    ]


def _read_file(file: str | None, path: Path, line: int) -> str:
    if not file:
        raise ValueError(f"{path}, line {line}: the column 'file' is empty")
    return file


def _read_label(row: dict[str, str], path: Path, line: int) -> int:
    text = row.get("label", str(UNKNOWN))
    try:
        label = int(text)
    except (TypeError, ValueError):
        label = UNKNOWN - 1
    if not UNKNOWN <= label < 2**31:
        raise ValueError(
            f"{path}, line {line}: the label {text!r} is not a class number 0, 1, ... or -1 for "
            "unknown"
        )
    return label


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
