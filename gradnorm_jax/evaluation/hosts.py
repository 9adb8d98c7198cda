"""What several processes have to agree on: how to share the work, where to start, when to stop."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from gradnorm_jax.data.split import Split

Distributed = Literal["auto"] | tuple[str, int, int]
"""How processes find each other: by what the cluster says, or by the coordinator's address and
port, the number of processes, and which of them this one is."""


class Interrupted(Exception):  # noqa: N818
    """The run has stopped, through no fault of its own; started again, it goes on where it was."""


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
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"this is no cluster that JAX recognises ({error}); give the coordinator's "
                "HOST:PORT, the number of processes, and which of them this one is: "
                "--distributed HOST:PORT PROCESSES THIS_ONE"
            ) from error
        return
    address, count, index = distributed
    if not 0 <= index < count:
        raise ValueError(
            f"process {index} of {count} is asked for: number the processes from 0 to {count - 1}"
        )
    jax.distributed.initialize(address, count, index)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    smallest(0)


def smallest(value: int) -> int:
    """The smallest of the values of all processes."""
    return int(gather(np.array([value])).min())


def gather(values: np.ndarray) -> np.ndarray:
    """The arrays `[..., N]`, N >= 1, of all processes, stacked: `[processes, ..., N]`.

    Raises:
        JaxRuntimeError: a process cannot be reached.
    """
    if jax.process_count() == 1:
        return values[np.newaxis]
    try:
        # Byte by byte: JAX would round numbers of 64 bits.
        everything = multihost_utils.process_allgather(values.view(np.uint8))
    except ValueError as error:
        # This is how a connection that breaks shows here, and here alone.
        raise jax.errors.JaxRuntimeError(str(error)) from error
    return np.asarray(everything).view(values.dtype)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """A function that tells, once per step, whether to stop here because SIGTERM has come.

    Of several processes one signal stops all, after the same step: `connect`, called within the
    block, puts JAX's own handler in the place of this one, and JAX passes the notice on. The
    function must then be called equally often by each.
    """
    received = threading.Event()
    steps = itertools.count()

    def stop_here() -> bool:
        return received.is_set() or multihost_utils.reached_preemption_sync_point(next(steps))

    if jax.distributed.is_initialized():
        yield stop_here  # JAX's handler is there already, and must stay
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield stop_here
    finally:
        signal.signal(signal.SIGTERM, before)
