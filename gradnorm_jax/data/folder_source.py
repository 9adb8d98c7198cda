"""Image files on disk as a source."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from gradnorm_jax.data.source import Record, hash_facts
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
        ignored: the files that were passed over because their names are not those of images, or
            because they are no regular files.
        classes: how many class folders the labels are the positions of; None if they are given.
        spec: what `open_source` takes to open it again.
    """

    name: str
    root: Path
    ids: Sequence[str] = dataclasses.field(repr=False)
    labels: Sequence[int] = dataclasses.field(repr=False)
    ignored: Sequence[str] = dataclasses.field(default=(), repr=False)
    classes: int | None = None
    spec: str | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        """Reads the file at position `index`; OSError if that fails."""
        file = self.ids[index]
        return Record(file, self.labels[index], (self.root / file).read_bytes())

    def fingerprint(self) -> str:
        """A hash of the ids, labels, sizes and modification times of all files; none is read.

        Copies of the files are other files unless their times are copied too, as by `cp -p`.
        """
        stats = [os.stat(self.root / file) for file in self.ids]
        versions = [(each.st_size, each.st_mtime_ns) for each in stats]
        return hash_facts([self.ids, self.labels, versions])


def folder_source(path: str | os.PathLike[str]) -> FileSource:
    """All images in a folder and its subfolders, in the order of their relative paths.

    Files whose names do not end in one of `IMAGE_EXTENSIONS`, hidden ones (names that start with a
    dot, and all below a hidden folder), and what is no regular file (a pipe, a link to nothing) are
    listed in `ignored`.

    Labels are the positions of the class folders, the first level of subfolders, in sorted order;
    one without images counts too, so that it does not shift the others. Labels are unknown when
    there are fewer than two such folders, or when images lie beside them: guessing would yield a
    wrong accuracy where none can be known. Give labels of a flat folder by `csv_source`; a CSV file
    beside the folder is not picked up by itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, holds no image, or links back to itself.
        OSError: a subfolder cannot be read.
    """
    root = Path(os.path.expanduser(path))
    if not root.exists():
        raise FileNotFoundError(f"the image folder {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give a folder of images, or csv:PATH for a list")
    regular = dict(sorted(_relative_files(root)))
    files = list(regular)
    ids = tuple(file for file in files if is_image(file) and regular[file])
    if not ids:
        raise ValueError(
            f"the folder {root} holds no image: none of its {len(files)} files has a name ending "
            f"in {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    ignored = tuple(file for file in files if not (is_image(file) and regular[file]))
    labels, classes = _folder_labels(root, ids)
    spec = f"folder:{root.resolve()}"
    return FileSource(root.resolve().name, root, ids, labels, ignored, classes, spec)


def _relative_files(root: Path) -> Iterator[tuple[str, bool]]:
    """What is below a folder, and whether it is a regular file; reading others may never end."""
    folders = [""]
    while folders:
        below = folders.pop()
        if below and os.path.islink(root / below) and _is_inside_itself(root / below):
            raise ValueError(
                f"{root / below} links back to a folder that holds it: remove the link"
            )
        with os.scandir(root / below) as entries:
            for entry in entries:
                if _holds(entry.is_dir):
                    folders.append(f"{below}{entry.name}/")
                else:
                    yield f"{below}{entry.name}", _holds(entry.is_file)


def _holds(test: Callable[[], bool]) -> bool:
    # Links that lead round in circles are an error of the system.
    try:
        return test()
    except OSError:
        return False


def _is_inside_itself(folder: Path) -> bool:
    # Followed, such a link would list every image over and over.
    return any(parent.resolve() == folder.resolve() for parent in folder.parents)


def is_image(file: str) -> bool:
    """Whether a relative path is that of an image, by its ending, and no part of it is hidden."""
    path = PurePosixPath(file)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not hidden


def _folder_labels(root: Path, ids: Sequence[str]) -> tuple[tuple[int, ...], int | None]:
    """The labels, and the number of class folders if these tell them."""
    folders = sorted(x.name for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))
    if len(folders) < 2 or any("/" not in file for file in ids):
        return (UNKNOWN,) * len(ids), None
    classes = {folder: label for label, folder in enumerate(folders)}
    return tuple(classes[file.partition("/")[0]] for file in ids), len(classes)


def some(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
