"""A folder that files are written to whole or not at all, on any storage that TensorStore knows."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import tensorstore as ts

PATIENCE_SECONDS = 120.0
"""How long a file may take to be read or written before its storage counts as out of order."""

_LOCK = ".lock"
# Six more tries, after 1, 2, 4, ... 32 seconds. TensorStore's own quarter of an hour is too long to
# wait for the news that there is no connection.
_RETRIES = {"max_retries": 6}
_CONTEXT = ts.Context({"gcs_request_retries": _RETRIES, "s3_request_retries": _RETRIES})


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
            result = self.store.read(name).result(PATIENCE_SECONDS)
        return bytes(result.value) if result.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file: other readers see all of it, or none. OSError if that fails."""
        with writing(f"{self.address}/{name}"):
            self.store.write(name, content).result(PATIENCE_SECONDS)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless there is one; whether it did.

        Of several processes that do this at once, exactly one does it. OSError if writing fails.
        """
        with writing(f"{self.address}/{name}"):
            found = self.store.read(name).result(PATIENCE_SECONDS)
            if found.state == "value":
                return False
            # Absence is a state that a write can be made conditional on.
            write = self.store.write(name, content, if_equal=found.stamp.generation)
            return bool(write.result(PATIENCE_SECONDS).generation)

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with writing(f"{self.address}/{name}"):
            self.store.write(name, None).result(PATIENCE_SECONDS)

    def names(self, prefix: str = "") -> list[str]:
        """The files whose names start so, in order, hidden ones left out."""
        with reading(f"{self.address}/{prefix}"):
            found = (self.store / prefix).list().result(PATIENCE_SECONDS)
        names = sorted(prefix + rest.decode() for rest in found)
        return [name for name in names if not PurePosixPath(name).name.startswith(".")]


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
            return Folder(address, ts.KvStore.open(f"{address}/", context=_CONTEXT).result())
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} already exists and is not a folder; choose another --out")
    spec = {"driver": "file", "path": f"{path.absolute()}/"}
    return Folder(address, ts.KvStore.open(spec).result())


@contextlib.contextmanager
def reading(name: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever goes wrong in the block into an OSError that says what cannot be read."""
    with _plain_errors(f"{name} cannot be read", remedy):
        yield


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Turns whatever goes wrong in the block into an OSError that says what cannot be written."""
    with _plain_errors(f"{name} cannot be written"):
        yield


@contextlib.contextmanager
def lock(folder: Folder) -> Iterator[bool]:
    """Keeps all others from taking the same lock, until the end of the block or of the process.

    Yields whether it does. On a file system that is a lock of the operating system. Object storage
    has none that a killed process would give back, so there nothing is locked, and this much holds
    instead:

    - A folder belongs to one configuration. `Folder.create` makes its config, so of runs that
      differ and start together exactly one goes on, and the others are refused.
    - Runs of the same configuration write the same content to the same files, each whole or not at
      all. Two at once waste work, and one may put back an earlier state of a file that the other
      has written since. Who then reads too few rows or statistics says so and stops; starting the
      same line again makes up for them. No result is wrong.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be written.
    """
    root = _local(folder.address)
    if root is None:
        yield False
        return
    with writing(folder.address):
        root.mkdir(parents=True, exist_ok=True)
    path = root / _LOCK
    file = _lock_file(path, folder.address)
    try:
        yield True
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
def _plain_errors(problem: str, remedy: str = "") -> Iterator[None]:
    # TensorStore raises ValueError whatever is wrong, with details in brackets.
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).partition(" [")[0].replace("\n", " ").replace("\0", "")
        if isinstance(error, TimeoutError):
            reason = f"no answer within {PATIENCE_SECONDS:g} s"
        raise OSError(f"{problem}: {reason}{remedy}") from error
