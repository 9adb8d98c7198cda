"""Results of passes kept in a folder, file by file, so that a run survives being killed.

A process writes the rows of every so many of its steps to a Parquet file of its own. The last file
may hold fewer steps for now; it is written anew when there are more. Statistics are written after
the rows, and rows after the features and logits of the same steps, so that whatever the moment of a
kill, the files tell which steps are done.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax

from gradnorm_jax.data.split import Split
from gradnorm_jax.evaluation.cache import Cache
from gradnorm_jax.evaluation.folder import Folder
from gradnorm_jax.evaluation.formats import (
    BROKEN,
    Part,
    Statistics,
    decode_rows,
    decode_statistics,
    decode_steps,
    encode_rows,
    encode_statistics,
)
from gradnorm_jax.evaluation.hosts import Interrupted, smallest, wait_for_all
from gradnorm_jax.evaluation.passes import Collect, add
from gradnorm_jax.evaluation.peers import check_peers
from gradnorm_jax.evaluation.scoring import Feed, Step
from gradnorm_jax.evaluation.table import ScoreTable, concatenate, covers, in_source_order, up_to

SHARD_ROWS = 16384
"""About how many rows a file holds."""
SAVE_SECONDS = 60.0
"""About how much work is lost when a run is killed."""

Content = TypeVar("Content")


class Shards(NamedTuple):
    """The files of one data set's results.

    Attributes:
        folder: of the run.
        name: of the data set.
        length: the number of its positions.
        split: how they are dealt out to processes.
    """

    folder: Folder
    name: str
    length: int
    split: Split

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return self.split.num_steps(self.length)

    @property
    def steps_each(self) -> int:
        """Steps per file."""
        return max(1, SHARD_ROWS // self.split.rows)

    def rows_file(self, step: int, process: int) -> str:
        """The file that holds the rows of one process's step."""
        return f"{_rows_folder(self.name)}{step // self.steps_each:05}-{process:05}.parquet"

    def statistics_file(self, process: int) -> str:
        """The file of what one process's rows tell fitted detectors."""
        return f"statistics/{self.name}-{process:05}.safetensors"


class Progress(NamedTuple):
    """What one process has done of a pass.

    Attributes:
        steps: how many.
        tables: the rows of those that are in the last file.
        sums: the statistics of all of them.
    """

    steps: int
    tables: list[ScoreTable]
    sums: Any


def in_folder(
    folder: Folder, cache: Cache | None = None, stop_here: Callable[[], bool] = bool
) -> Collect:
    """The `Collect` that keeps results in a folder and goes on from what it finds there.

    Args:
        folder: of the run; the same for all processes.
        cache: where features and logits are kept as well.
        stop_here: whether to stop after the present step; asked once per step.

    Returns:
        A `Collect` that raises `Interrupted` when it has been stopped, OSError if a file cannot be
        read or written or another process has failed, and ValueError if a file is damaged or
        incomplete.
    """

    def collect(
        feed: Feed, split: Split, steps: Callable[[int], Iterator[Step]], zero: Any
    ) -> tuple[ScoreTable, Any]:
        shards = Shards(folder, feed.name, feed.length, split)
        place = feed.name, feed.length, split
        keep = cache.writer(*place) if cache else _keep_nothing
        kept = cache.count_steps(*place) if cache else shards.num_steps
        _go_on(shards, _resume(shards, zero, kept), keep, stop_here, steps)
        wait_for_all()
        return read_rows(folder, feed.name, feed.length), _read_sums(shards, zero)

    return collect


def read_rows(folder: Folder, name: str, length: int) -> ScoreTable:
    """The rows of a data set that all processes have written, in source order.

    Args:
        folder: of the run.
        name: of the data set.
        length: the number of its positions.

    Raises:
        ValueError: a file is missing, incomplete or damaged.
    """
    parts = [_read(folder, file, decode_rows) for file in folder.names(_rows_folder(name))]
    if tables := [part.table for part in parts if part]:
        table = in_source_order(concatenate(tables))
        if covers(table, length):
            return table
    raise ValueError(
        f"{folder.address} does not hold each of the {length} images of {name} once; start the run "
        "that wrote it again"
    )


def _read_sums(shards: Shards, zero: Any) -> Any:
    """The statistics of all processes together."""
    processes = range(shards.split.processes)
    found = [_read_statistics(shards, process, zero) for process in processes]
    if any(each.steps != shards.num_steps for each in found):
        raise ValueError(
            f"{shards.folder.address} does not hold the statistics of all images of {shards.name}; "
            "start the same line again"
        )
    return functools.reduce(add, (each.sums for each in found))


def _rows_folder(name: str) -> str:
    return f"scores/{name}.parquet/"


def _go_on(
    shards: Shards,
    progress: Progress,
    keep: Callable[[int, Any], Callable[[], None]],
    stop_here: Callable[[], bool],
    steps: Callable[[int], Iterator[Step]],
) -> None:
    """Carries out the steps that are missing."""
    # Processes that have got further than others go along with them, without counting anything
    # twice.
    start = smallest(progress.steps)
    wait, saved = _nothing, time.monotonic()
    for number, step in enumerate(steps(start) if start < shards.num_steps else (), start):
        check_peers()
        stopping = stop_here()
        if number == progress.steps:
            progress = _advance(shards, progress, step)
            wait()
            wait = keep(shards.split.first(number), step.outputs)
            if _is_full(shards, progress) or stopping or time.monotonic() > saved + SAVE_SECONDS:
                wait()
                _save(shards, progress)
                wait, saved = _nothing, time.monotonic()
        if stopping:
            raise Interrupted("stopped; start the same line again to go on")


def _nothing() -> None:
    pass


def _keep_nothing(first: int, outputs: Any) -> Callable[[], None]:
    return _nothing


def _is_full(shards: Shards, progress: Progress) -> bool:
    """Whether the last file needs no more steps."""
    return progress.steps % shards.steps_each == 0 or progress.steps == shards.num_steps


def _advance(shards: Shards, progress: Progress, step: Step) -> Progress:
    tables = progress.tables if progress.steps % shards.steps_each else []
    return Progress(progress.steps + 1, [*tables, step.table], add(progress.sums, step.statistics))


def _save(shards: Shards, progress: Progress) -> None:
    folder, process, last = shards.folder, shards.split.process, progress.steps - 1
    part = Part(last % shards.steps_each + 1, concatenate(progress.tables))
    folder.write(shards.rows_file(last, process), encode_rows(part))
    if jax.tree.leaves(progress.sums):
        statistics = Statistics(progress.steps, progress.sums)
        folder.write(shards.statistics_file(process), encode_statistics(statistics))


def _resume(shards: Shards, zero: Any, kept: int) -> Progress:
    """What is done, of which the cache has the first `kept` steps."""
    process, written = shards.split.process, min(_count_steps(shards), kept)
    statistics = _read_statistics(shards, process, zero)
    if statistics.steps > written and jax.tree.leaves(zero):
        # A damaged file of rows or outputs was deleted. What its images told cannot be subtracted.
        statistics = Statistics(0, zero)
    steps = min(written, statistics.steps)
    tables = []
    if steps % shards.steps_each:
        part = _read(shards.folder, shards.rows_file(steps, process), decode_rows)
        assert part is not None
        # More rows than statistics were saved if the run was killed in between.
        tables = [up_to(part.table, shards.split.first(steps))]
    return Progress(steps, tables, statistics.sums)


def _count_steps(shards: Shards) -> int:
    """The number of steps whose rows this process has written."""
    for first in range(0, shards.num_steps, shards.steps_each):
        file = shards.rows_file(first, shards.split.process)
        steps = _read(shards.folder, file, decode_steps) or 0
        if steps < shards.steps_each:
            return first + steps
    return shards.num_steps


def _read_statistics(shards: Shards, process: int, zero: Any) -> Statistics:
    if not jax.tree.leaves(zero):
        return Statistics(shards.num_steps, zero)
    decode = functools.partial(decode_statistics, like=zero)
    found = _read(shards.folder, shards.statistics_file(process), decode)
    return found or Statistics(0, zero)


def _read(folder: Folder, name: str, decode: Callable[[bytes], Content]) -> Content | None:
    content = folder.read(name)
    try:
        return None if content is None else decode(content)
    except BROKEN as error:
        raise ValueError(
            f"{folder.address}/{name} is damaged: delete it and start the same line again"
        ) from error
