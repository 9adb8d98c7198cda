"""Progress bars: by default in a terminal or a notebook, and nothing in a log."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Shows progress: `(items, description, total or None if it is unknown) -> items`."""


def no_progress(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    """The `Track` that shows nothing."""
    return items


@contextlib.contextmanager
def show_progress(progress: bool | Track | None = None) -> Iterator[Track]:
    """A `Track`: the one given, or bars (True), or nothing (False); by default what fits the place.

    Raises:
        TypeError: `progress` is none of these.
    """
    if callable(progress):
        yield progress
        return
    if not (progress is None or isinstance(progress, bool)):
        raise TypeError(f"progress must be True, False or a function, got {progress!r}")
    if progress is False:
        yield no_progress
        return
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    if progress is None and not (console.is_terminal or console.is_jupyter):
        yield no_progress
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as bars:

        def track(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
            task = bars.add_task(description, total=total)
            for item in items:
                yield item
                bars.advance(task)
            bars.update(task, total=bars.tasks[task].completed)

        yield track
