"""A file to which the score of each image is added, so that a watch goes on after a stop."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class ScoreLog(NamedTuple):
    """What a log holds, and how it goes on.

    Attributes:
        files: those scored earlier, in order.
        scores: theirs.
        add: writes down one more, at once.
    """

    files: list[str]
    scores: list[float]
    add: Callable[[str, float], object]


@contextlib.contextmanager
def open_log(path: Path | None, facts: Mapping[str, Any]) -> Iterator[ScoreLog]:
    """The log at a path, new if there is none; one that keeps nothing if the path is None.

    Args:
        path: of a file of JSON lines. If the last is cut off, adding it was interrupted, and it
            goes.
        facts: what the scores depend on, its first line.

    Raises:
        ValueError: the file is no such log, or another process is writing it.
    """
    if path is None:
        yield ScoreLog([], [], lambda file, score: None)
        return
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another watch") from error
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not _to_line(facts).startswith(content):
            raise ValueError(f"{path} is not a log of `gradnorm-jax watch`")
        files, scores = _parse(path, whole.splitlines(), facts)
        file.truncate(len(whole))
        if not whole:
            file.write(_to_line(facts))

        def add(name: str, score: float) -> None:
            file.write(_to_line({"file": name, "score": score}))

        yield ScoreLog(files, scores, add)


def _parse(
    path: Path, lines: list[bytes], facts: Mapping[str, Any]
) -> tuple[list[str], list[float]]:
    try:
        header, *rows = [json.loads(line) for line in lines] or [facts]
        files, scores = [str(row["file"]) for row in rows], [float(row["score"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a log of `gradnorm-jax watch`") from error
    if header != facts:
        raise ValueError(f"{path} is the log of another detector or --seed: give another --log")
    return files, scores


def _to_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
