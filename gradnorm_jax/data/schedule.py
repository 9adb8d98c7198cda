"""Which batches of a data set a process takes."""

import dataclasses
from collections.abc import Iterable

PART_SIZE = 256
"""About how many inputs a part of a run folder holds: the most that a killed run loses."""


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Which batches of a data set this process takes, in ascending order.

    Batch b covers the `batch_size` positions from `b * batch_size` on. The last batch of a data set
    is the one that is not full; it may be empty. Every `batches_per_part` batches make up a part,
    the unit in which results are kept and in which processes share the work: process i of n takes
    the parts i, i + n, i + 2n, ...

    Attributes:
        batch_size: B, at least 1.
        batches_per_part: at least 1.
        process: which process this is, 0 <= process < processes.
        processes: how many there are.
        done: the parts that need not be taken any more.
    """

    batch_size: int
    batches_per_part: int = 1
    process: int = 0
    processes: int = 1
    done: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if (
            min(self.batch_size, self.batches_per_part) < 1
            or not 0 <= self.process < self.processes
        ):
            raise ValueError(
                f"{self} cannot be: sizes are at least 1, and process is from 0 to processes - 1"
            )

    @property
    def part_size(self) -> int:
        """Positions per part."""
        return self.batch_size * self.batches_per_part

    def part(self, batch: int) -> int:
        """The part that a batch belongs to."""
        return batch // self.batches_per_part

    def takes(self, batch: int) -> bool:
        """Whether this process takes the batch."""
        part = self.part(batch)
        return part % self.processes == self.process and part not in self.done

    def taken(self, length: int) -> list[int]:
        """The batches that this process takes of `length` positions."""
        return [b for b in range(length // self.batch_size + 1) if self.takes(b)]


def make_schedule(
    batch_size: int,
    devices: int,
    lengths: Iterable[int | None],
    process: tuple[int, int] = (0, 1),
) -> BatchSchedule:
    """Batches no larger than the largest data set, and a multiple of the number of devices.

    Args:
        batch_size: at most, but for the multiple.
        devices: how many there are.
        lengths: of the data sets; None where it is not known.
        process: `(i, n)`: this is process i of n.
    """
    longest = max(batch_size if n is None else n for n in lengths)
    batch_size = min(batch_size, max(longest, 1))
    batch_size = -(-batch_size // devices) * devices
    return BatchSchedule(batch_size, max(1, PART_SIZE // batch_size), *process)
