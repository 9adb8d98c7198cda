"""A folder that files are written to whole or not at all, on any storage that TensorStore knows."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import tensorstore as ts

_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder by its address.

    Attributes:
        address: what users call it: a path, or a URL such as `gs://bucket/folder`.
        store: its files by their names relative to it.
    """

    address: str
    store: ts.KvStore

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if there is none. OSError if it cannot be read."""
        with reading(f"{self.address}/{name}"):
            result = self.store.read(name).result()
        return bytes(result.value) if result.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file: other readers see all of it, or none. OSError if that fails."""
        with writing(f"{self.address}/{name}"):
            self.store.write(name, content).result()

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with writing(f"{self.address}/{name}"):
            self.store.delete_range(ts.KvStore.KeyRange(name, name + "\0")).result()

    def names(self, below: str = "") -> list[str]:
        """The files in it, or in a folder `below/` of it, in order, hidden ones left out."""
        with reading(f"{self.address}/{below}"):
            found = map(bytes.decode, (self.store / below).list().result())
        return sorted(below + name for name in found if not name.startswith("."))


def open_folder(address: str | os.PathLike[str]) -> Folder:
    """The folder at a path or URL, which need not exist.

    Raises:
        FileExistsError: there is a file in its place.
        OSError: its storage is not known, or cannot be reached.
    """
    address = os.fspath(address).rstrip("/")
    path = _local(address)
    if path is None:
        with reading(address):
            return Folder(address, ts.KvStore.open(f"{address}/").result())
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} already exists and is not a folder; choose another --out")
    spec = {"driver": "file", "path": f"{path.absolute()}/"}
    return Folder(address, ts.KvStore.open(spec).result())


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns whatever goes wrong in the block into an OSError that says what cannot be read."""
    with _plain_errors(f"{name} cannot be read"):
        yield


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Turns whatever goes wrong in the block into an OSError that says what cannot be written."""
    with _plain_errors(f"{name} cannot be written"):
        yield


@contextlib.contextmanager
def lock(folder: Folder) -> Iterator[None]:
    """Keeps all others from taking the same lock, until the end of the block or of the process.

    Nothing is locked on storage that is not a file system.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be written.
    """
    root = _local(folder.address)
    if root is None:
        yield
        return
    with writing(folder.address):
        root.mkdir(parents=True, exist_ok=True)
    path = root / _LOCK
    file = _lock_file(path, folder.address)
    try:
        yield
    finally:
        # A folder of results is to hold nothing else.
        path.unlink(missing_ok=True)
        file.close()


def _lock_file(path: Path, address: str) -> IO[str]:
    while True:
        with writing(address):
            file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise BlockingIOError(
                f"another run is writing to {address}; wait for its end or choose another --out"
            ) from error
        # The last holder may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def to_json(content: Any) -> bytes:
    """JSON as it is written to files."""
    return f"{json.dumps(content, indent=2, default=str, allow_nan=False)}\n".encode()


def _local(address: str) -> Path | None:
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    return None if "://" in address else Path(address).expanduser()


@contextlib.contextmanager
def _plain_errors(problem: str) -> Iterator[None]:
    # TensorStore raises ValueError whatever is wrong, with details in brackets.
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).partition(" [")[0].replace("\n", " ").replace("\0", "")
        raise OSError(f"{problem}: {reason}") from error
