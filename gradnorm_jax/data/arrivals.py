"""Image files in a folder as they arrive, none before it is whole."""

import os
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from gradnorm_jax.data.folder_source import is_image


class _Look(NamedTuple):
    """What a file looks like from outside."""

    modified: int
    size: int


def arrivals(
    folder: str | os.PathLike[str],
    done: Collection[str] = (),
    *,
    interval: float = 1.0,
    once: bool = False,
    idle_seconds: float | None = None,
) -> Iterator[list[str]]:
    """The image files in a folder and its subfolders, in the order in which they arrived.

    A file is taken for whole when two looks at it, `interval` apart, find the same size and time of
    modification; a writer that pauses for longer is told apart only if it renames the file when it
    is done, as rsync and browsers do. Which files are images is as for `folder_source`, but links
    to folders are not followed.

    Args:
        folder: where to look.
        done: relative paths of files to be passed over. It is read at each look, so the caller may
            add what has been used. Another file is yielded again when it has changed.
        interval: seconds between two looks, above 0.
        once: end after the files that are there at the beginning.
        idle_seconds: end when nothing new has come for so long; None for never.

    Yields:
        Relative paths, by time of modification and then name, of what has newly become whole.

    Raises:
        FileNotFoundError: there is no such folder, or no longer.
        ValueError: an option is out of range.
    """
    if not interval > 0 or (idle_seconds is not None and not idle_seconds >= 0):
        raise ValueError(
            f"interval must be above 0 and idle_seconds at least 0: {interval}, {idle_seconds}"
        )
    taken: dict[str, _Look] = {}
    before, last_news = _look(folder, done), time.monotonic()
    asked = before.keys() if once else None
    while True:
        time.sleep(interval)
        now = _look(folder, done)
        fresh = {name: look for name, look in now.items() if taken.get(name) != look}
        if asked is not None:
            fresh = {name: look for name, look in fresh.items() if name in asked}
        whole = {name: look for name, look in fresh.items() if before.get(name) == look}
        if fresh:
            last_news = time.monotonic()
        taken = {name: look for name, look in (taken | whole).items() if name in now}
        if whole:
            yield sorted(whole, key=lambda name: (whole[name].modified, name))
        if once and len(whole) == len(fresh):
            return
        if idle_seconds is not None and time.monotonic() - last_news >= idle_seconds:
            return
        before = now


def _look(folder: str | os.PathLike[str], done: Collection[str]) -> dict[str, _Look]:
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = {}
    for below, _, files in os.walk(root):
        inside = Path(below).relative_to(root)
        prefix = f"{inside.as_posix()}/" if inside.parts else ""
        for name in (prefix + file for file in files):
            if name in done or not is_image(name):
                continue
            try:
                facts = os.stat(root / name)
            except OSError:
                continue  # removed meanwhile, or a link to nothing
            if stat.S_ISREG(facts.st_mode):
                found[name] = _Look(facts.st_mtime_ns, facts.st_size)
    return found
