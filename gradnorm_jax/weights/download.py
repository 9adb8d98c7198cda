"""Files from the web: resumed, checked, and whole or not there at all."""

import contextlib
import hashlib
import http.client
import logging
import math
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradnorm_jax
from gradnorm_jax.progress import Track, show_progress

TIMEOUT_SECONDS = 30.0
"""How long a server may be silent."""

_CHUNK = 2**20


def fetch(url: str, path: Path, *, sha256: str = "", progress: bool | Track | None = None) -> Path:
    """A file from the web; downloaded unless it is there, and checked in any case.

    What an interrupted download has left is continued, if the server still has the same file. Of
    processes that fetch the same file at once, one downloads it. Where no SHA-256 is known, that of
    the first download is noted in `NAME.sha256`, and the file has to be the same ever after.

    Args:
        url: where the file is.
        path: where it is to be.
        sha256: what its hash in hexadecimal digits begins with.
        progress: see `gradnorm_jax.progress.show_progress`.

    Returns:
        `path`.

    Raises:
        OSError: there is no connection, the server has no such file, or it stopped amid the file.
        ValueError: the file is not the one that is recorded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if path.exists():
            _check(path, path, sha256, f"delete {path} to download it again")
            return path
        part = _download(url, path, progress)
        try:
            _check(part, path, sha256, f"{url} has changed, or the connection is not to be trusted")
        except ValueError:
            part.unlink()
            raise
        part.replace(path)
    return path


def _download(url: str, path: Path, progress: bool | Track | None) -> Path:
    """The whole file, beside `path`."""
    part, version = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.version")
    with _plain_errors(url, path), _request(url, part, version) as response:
        start = part.stat().st_size if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        if not start:
            part.unlink(missing_ok=True)
            version.write_text(response.headers["ETag"] or response.headers["Last-Modified"] or "")
        total = None if response.length is None else start + response.length
        with open(part, "ab") as file, show_progress(progress) as track:
            steps = None if total is None else math.ceil((total - start) / _CHUNK)
            for chunk in track(_chunks(response), f"{path.name}, MiB", steps):
                file.write(chunk)
        if total is not None and part.stat().st_size != total:
            raise OSError(f"it stopped after {part.stat().st_size} of {total} bytes")
    version.unlink()
    return part


def _request(url: str, part: Path, version: Path) -> Any:
    """An open response: what is missing of the file, if the server allows that, or all of it."""
    headers = {"User-Agent": f"gradnorm_jax/{gradnorm_jax.__version__}"}
    known = version.read_text() if version.exists() and part.exists() else ""
    # A weak tag does not say that files are the same to the byte.
    if known and not known.startswith("W/"):
        ranged = {"Range": f"bytes={part.stat().st_size}-", "If-Range": known}
        try:
            response = _open(url, headers | ranged)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
        else:
            begins = f"bytes {part.stat().st_size}-"
            if response.status != 206 or (response.headers["Content-Range"] or "").startswith(
                begins
            ):
                return response
            response.close()
    return _open(url, headers)


def _open(url: str, headers: dict[str, str]) -> Any:
    return urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS
    )


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read(_CHUNK):
        yield chunk


def _check(file: Path, path: Path, sha256: str, remedy: str) -> None:
    """ValueError unless a file, which is or will be at `path`, is the one recorded or noted."""
    note = path.with_name(f"{path.name}.sha256")
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not sha256 and not note.exists():
        # As sha256sum writes it, and checks it.
        note.write_text(f"{digest}  {path.name}\n")
        logging.getLogger(__name__).warning(
            f"no SHA-256 of {path.name} is recorded; {digest} is noted in {note} and checked from "
            "now on"
        )
    expected, source = sha256, "recorded"
    if not sha256:
        expected, source = note.read_text().partition(" ")[0], f"noted in {note}"
    if not digest.startswith(expected):
        raise ValueError(
            f"{path.name} is damaged or another file: its SHA-256 begins {digest[:16]} in place of "
            f"{expected[:16]}, which is {source}; {remedy}"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on every system

    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _plain_errors(url: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        if isinstance(error, urllib.error.HTTPError):
            reason = f"the server answers {error.code}, {reason}"
        raise OSError(
            f"{url} cannot be downloaded: {re.sub(r'^.Errno -?[0-9]+. ', '', str(reason))}; try "
            f"again, which continues where it stopped, or put the file at {path} by hand"
        ) from error
