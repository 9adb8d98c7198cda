"""Image files on disk as a source."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath

from gradnorm_jax.data.source import Record, hash_records
from gradnorm_jax.data.stream import UNKNOWN

IMAGE_EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


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

    def fingerprint(self) -> str:
        """A hash of the ids and labels of all files, and of the contents of 64 spread evenly.

        It is cheap, and does not see a single file whose content has changed.
        """
        spread = sorted({i * (len(self) - 1) // 63 for i in range(64)})
        return hash_records([self.ids, self.labels], map(self.__getitem__, spread))


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
    ids = tuple(file for file in files if is_image(file))
    if not ids:
        raise ValueError(
            f"the folder {root} holds no image: none of its {len(files)} files has a name ending "
            f"in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    unreadable = [ascii(file) for file in ids if not _is_utf8(file)]
    if unreadable:
        raise ValueError(f"{root} holds names that are not UTF-8: rename {some(unreadable)}")
    ignored = tuple(file for file in files if not is_image(file))
    return FileSource(root.resolve().name, root, ids, _folder_labels(root, ids), ignored)


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


def is_image(file: str) -> bool:
    """Whether a relative path is that of an image, by its ending, and no part of it is hidden."""
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


def some(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
