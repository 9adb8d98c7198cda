"""What several processes have to agree on: where to start, when to stop, whether all is well."""

import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

Distributed = Literal["auto"] | tuple[str, int, int]
"""How processes find each other: by what the cluster says, or by the coordinator's address and
port, the number of processes, and which of them this one is."""


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop. What is done is saved."""


@dataclasses.dataclass(frozen=True)
class Split:
    """How the positions of a data set are dealt out to processes, step by step.

    Attributes:
        rows: B, the rows that a process takes in each step.
        process: which process this is.
        processes: how many there are.
    """

    rows: int
    process: int
    processes: int

    def first(self, step: int) -> int:
        """The position of this process's first row in a step."""
        return (step * self.processes + self.process) * self.rows

    def num_steps(self, length: int) -> int:
        """The number of steps, the same for every process, through `length` positions."""
        return -(-length // (self.rows * self.processes))


def split_evenly(batch_size: int, num_devices: int, process: int, processes: int) -> Split:
    """Deals a batch of all devices, rounded up to a multiple of their number, to the processes."""
    rows = -(-batch_size // num_devices) * num_devices // processes
    return Split(rows, process, processes)


def connect(distributed: Distributed) -> None:
    """Makes one program of several processes; before any computation.

    Raises:
        ValueError: the cluster is not one that JAX recognises, or the numbers make no sense.
    """
    if distributed == "auto":
        jax.distributed.initialize()
        return
    address, count, index = distributed
    if not 0 <= index < count:
        raise ValueError(
            f"process {index} of {count} is asked for: number the processes from 0 to {count - 1}"
        )
    jax.distributed.initialize(address, count, index)


@contextlib.contextmanager
def shared_fate() -> Iterator[None]:
    """Ends when the block has ended in every process, and fails in all if it fails in one.

    Raises:
        ConnectionAbortedError: it has failed in another process.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        failures = _gather(int(failed))
        if not failed and failures.any():
            raise ConnectionAbortedError(
                f"process {failures.argmax()} of {failures.size} has failed; it says why"
            )


def smallest(value: int) -> int:
    """The smallest of the values of all processes."""
    return int(_gather(value).min())


def _gather(value: int) -> np.ndarray:
    if jax.process_count() == 1:
        return np.array([value])
    return np.asarray(multihost_utils.process_allgather(np.int32(value)))


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """A function that tells, once per step, whether to stop here because SIGTERM has come.

    Of several processes one signal stops all, after the same step: JAX passes the notice on. The
    function must then be called equally often by each.
    """
    received = threading.Event()
    steps = itertools.count()

    def stop_here() -> bool:
        return received.is_set() or multihost_utils.reached_preemption_sync_point(next(steps))

    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield stop_here
    finally:
        signal.signal(signal.SIGTERM, before)
