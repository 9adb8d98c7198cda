"""What no result of a run depends on: where its images are, and how long each pass took.

Each process keeps a file of its own, `journal/PROCESS-of-PROCESSES.json`. Among the files of runs
that are otherwise equal to the byte, these alone differ.
"""

import collections
import contextlib
import datetime
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradnorm_jax.evaluation.storage import Folder, to_json
from gradnorm_jax.progress import Track

_FOLDER = "journal/"


class Pass(NamedTuple):
    """A pass over a data set in one session: how long it took, and for how many batches."""

    seconds: float
    batches: int


class Session(NamedTuple):
    """What a process has computed in one go.

    Attributes:
        started: when, ISO 8601 in UTC.
        passes: by data set, and "metrics".
    """

    started: str
    passes: Mapping[str, Pass]


class Journal(NamedTuple):
    """What has been noted of a run.

    Attributes:
        sources: by data set, what `data.open_source` takes to open its images again.
        sessions: those in which something was computed, except of processes that were killed.
    """

    sources: Mapping[str, str] = {}
    sessions: Sequence[Session] = ()


@contextlib.contextmanager
def keep_journal(
    folder: Folder, sources: Mapping[str, str | None], process: tuple[int, int], track: Track
) -> Iterator[Track]:
    """A `Track` that also takes the time of passes, which is noted when the body ends.

    Args:
        folder: of the run.
        sources: by data set, see `Journal`; None where images cannot be opened again.
        process: which of how many.
        track: shows progress.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    starts: list[tuple[str, float]] = []
    batches: collections.Counter[str] = collections.Counter()

    def timed(items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
        starts.append((description, time.monotonic()))
        for item in track(items, description, total):
            batches[description] += 1
            yield item

    try:
        yield timed
    finally:
        # A run of which nothing is kept keeps no journal either.
        if batches.keys() & sources.keys() and folder.names("scores/"):
            seconds: dict[str, float] = collections.defaultdict(float)
            # Up to the start of the next: the last batches are on the devices when a pass ends.
            for (name, start), (_, end) in itertools.pairwise([*starts, ("", time.monotonic())]):
                seconds[name] += end - start
            passes = {name: Pass(round(seconds[name], 3), batches[name]) for name in batches}
            _add(folder, f"{_FOLDER}{process[0]:05}-of-{process[1]:05}.json", sources, now, passes)


def read_journal(folder: Folder) -> Journal:
    """What all processes of a run have noted."""
    journals = [_read(folder, name) for name in folder.names(_FOLDER)]
    sources = {key: spec for each in journals for key, spec in each.sources.items()}
    return Journal(sources, [session for each in journals for session in each.sessions])


def _add(
    folder: Folder,
    name: str,
    sources: Mapping[str, str | None],
    started: str,
    passes: Mapping[str, Pass],
) -> None:
    sessions = [*_read(folder, name).sessions, Session(started, passes)]
    content = {
        "sources": {key: spec for key, spec in sources.items() if spec is not None},
        "sessions": [
            {"started": each.started, "passes": {k: p._asdict() for k, p in each.passes.items()}}
            for each in sessions
        ],
    }
    folder.write(name, to_json(content))


def _read(folder: Folder, name: str) -> Journal:
    try:
        content = json.loads(folder.read(name) or b"{}")
        sessions = [
            Session(
                str(each["started"]),
                {
                    key: Pass(float(found["seconds"]), int(found["batches"]))
                    for key, found in each["passes"].items()
                },
            )
            for each in content.get("sessions", [])
        ]
        return Journal({k: str(v) for k, v in content.get("sources", {}).items()}, sessions)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        # Nothing depends on it: damaged, it is as good as gone.
        return Journal()
