"""Where scored batches go: memory, or the files of a run, which survive being killed.

In a folder a data set is kept in parts (`BatchSchedule`), each a file that is written once and
whole. A part that is there is done, so a run resumes with the parts that are not, and processes
share a run by taking different parts. A data set ends with its first part that is not full.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.evaluation.output_cache import OutputCache
from gradnorm_jax.evaluation.records import (
    Interrupted,
    ScoredBatch,
    ScoreTable,
    concatenate,
)
from gradnorm_jax.evaluation.storage import (
    Folder,
    decode_arrays,
    encode_arrays,
    encode_rows,
    list_parts,
    part_file,
    read_part,
    read_table,
    rows_folder,
)

SAVE_SECONDS = 60.0
"""How often statistics are saved, which may be large."""
POLL_SECONDS = 1.0
"""How often the folder is looked into for what other processes have written."""


class Sink(Protocol):
    """Takes the scored batches of one data set, in order."""

    def done(self) -> frozenset[int]:
        """The parts that need not be computed."""
        ...

    def write(self, batch: ScoredBatch) -> None:
        """Takes a batch."""

    def finish(self) -> ScoreTable | None:
        """Everything there is of the data set; None if other processes have not written theirs."""


class MemorySink:
    """The `Sink` that keeps everything in memory."""

    def __init__(self) -> None:
        """Starts empty."""
        self._tables: list[ScoreTable] = []

    def done(self) -> frozenset[int]:
        """No part."""
        return frozenset()

    def write(self, batch: ScoredBatch) -> None:
        """Takes a batch."""
        self._tables.append(batch.table)

    def finish(self) -> ScoreTable | None:
        """All rows; None if there was no batch."""
        return concatenate(self._tables) if self._tables else None


class FolderSink:
    """The `Sink` that writes a file for each part of a data set."""

    def __init__(
        self, folder: Folder, name: str, schedule: BatchSchedule, cache: OutputCache | None = None
    ) -> None:
        """Starts with the parts that are done.

        Args:
            folder: of the run.
            name: of the data set.
            schedule: how batches make up parts.
            cache: where features and logits are kept as well.
        """
        self._folder, self._name, self._schedule, self._cache = folder, name, schedule, cache
        self._batches: list[ScoredBatch] = []
        parts = list_parts(folder, rows_folder(name))
        self._found = frozenset(p for p in parts if p % schedule.processes == schedule.process)
        self._whole = frozenset(filter(self._is_whole, self._found))

    def done(self) -> frozenset[int]:
        """The parts of this process that were there, and whole, at the start."""
        return self._whole

    def is_whole(self) -> bool:
        """Whether all that this process had written is whole."""
        return self._whole == self._found

    def write(self, batch: ScoredBatch) -> None:
        """Takes a batch, and writes the part that is finished by it."""
        self._batches.append(batch)
        if (batch.number + 1) % self._schedule.batches_per_part == 0:
            self._write_part()

    def finish(self) -> ScoreTable | None:
        """Writes the last part, and reads all of them."""
        self._write_part()
        return read_table(self._folder, self._name, self._schedule.part_size)

    def _is_whole(self, part: int) -> bool:
        try:
            _, facts = read_part(self._folder, self._name, part)
            if self._cache:
                self._cache.read(self._name, part, facts)
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; now it is written again", error)
            return False
        return True

    def _write_part(self) -> None:
        if not self._batches:
            return
        part = self._schedule.part(self._batches[0].number)
        facts = {}
        if self._cache:
            # Before the rows: where these are, the outputs are too.
            facts["outputs"] = self._cache.write(self._name, part, self._batches)
        table = concatenate([batch.table for batch in self._batches])
        self._folder.write(part_file(self._name, part), encode_rows(table, facts))
        self._batches = []


@dataclasses.dataclass
class StatisticsFiles:
    """What one pass over the training data teaches, kept by each process in a file of its own.

    Attributes:
        folder: of the run.
        name: of the pass.
        schedule: how batches make up parts, and who takes them.
        zero: the statistics of no inputs.
    """

    folder: Folder
    name: str
    schedule: BatchSchedule
    zero: list[Any]
    _saved: float = dataclasses.field(default_factory=time.monotonic)

    def load(self, written: frozenset[int] | None) -> tuple[bool, frozenset[int], list[Any]]:
        """Whether this process has finished, the parts that it has taken in, what they tell.

        It begins anew if the file is damaged, or if a part that it has taken in is not among those
        `written`: what that part tells cannot be taken out again. None: all of them are.
        """
        process, processes = self.schedule.process, self.schedule.processes
        try:
            count, complete, statistics = self._read(process)
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; now it is written again", error)
            return False, frozenset(), self.zero
        done = frozenset(range(process, process + count * processes, processes))
        if written is not None and not done <= written:
            return False, frozenset(), self.zero
        return complete, done, statistics

    def save(self, batches: int, statistics: list[Any], *, complete: bool = False) -> None:
        """Saves the statistics of the first `batches` batches, if it is time and a part has ended.

        Args:
            batches: how many batches of the data set come before the next.
            statistics: of those that this process takes.
            complete: whether these are all; then it is always time.
        """
        late = time.monotonic() > self._saved + SAVE_SECONDS
        if not complete and (batches % self.schedule.batches_per_part or not late):
            return
        process, processes = self.schedule.process, self.schedule.processes
        # The last part of all may not be full.
        parts = -(-batches // self.schedule.batches_per_part)
        count = len(range(process, parts, processes))
        leaves = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(statistics))}
        facts = {"parts": np.array([count]), "complete": np.array([complete])}
        self.folder.write(self._file(process), encode_arrays(facts | leaves))
        self._saved = time.monotonic()

    def merged(
        self,
        merge: Callable[[list[Any], list[Any]], list[Any]],
        wait_seconds: float,
        should_stop: Callable[[], bool],
    ) -> list[Any]:
        """The statistics of all processes, for which it waits.

        Raises:
            Interrupted: some process has not finished within `wait_seconds`.
        """
        deadline = time.monotonic() + wait_seconds
        merged = self.zero
        for process in range(self.schedule.processes):
            while (found := self._finished(process)) is None:
                if time.monotonic() >= deadline or should_stop():
                    raise Interrupted(
                        f"process {process} of {self.schedule.processes} has not finished fitting; "
                        "run the same command again to resume"
                    )
                time.sleep(POLL_SECONDS)
            merged = merge(merged, found)
        return merged

    def _finished(self, process: int) -> list[Any] | None:
        try:
            _, complete, statistics = self._read(process)
        except ValueError:
            # That process writes it again, once it is started.
            return None
        return statistics if complete else None

    def _read(self, process: int) -> tuple[int, bool, list[Any]]:
        content = self.folder.read(self._file(process))
        if content is None:
            return 0, False, self.zero
        try:
            arrays = decode_arrays(content)
            leaves = [arrays[f"{i}"] for i in range(len(jax.tree.leaves(self.zero)))]
            statistics = jax.tree.unflatten(jax.tree.structure(self.zero), leaves)
            return int(arrays["parts"][0]), bool(arrays["complete"][0]), statistics
        except Exception as error:  # of readers of damaged files, whatever they raise
            raise ValueError(
                f"{self.folder.address}/{self._file(process)} is damaged ({type(error).__name__})"
            ) from error

    def _file(self, process: int) -> str:
        return f"{self.name}/{process:05}-of-{self.schedule.processes:05}.safetensors"
