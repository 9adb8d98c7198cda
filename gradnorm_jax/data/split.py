"""How the positions of a data set are dealt out to processes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Split:
    """How the positions of a data set are dealt out to processes, step by step.

    Step s of all processes together covers the `processes * rows` positions from
    `s * processes * rows` on, of which each process takes its `rows` in a row. So every position
    comes once, and every process has the same number of steps.

    Attributes:
        rows: B, the rows that a process takes in each step; at least 1.
        process: which process this is, 0 <= process < processes.
        processes: how many there are.
    """

    rows: int
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or not 0 <= self.process < self.processes:
            raise ValueError(
                f"{self} cannot be: rows must be at least 1, and process from 0 to processes - 1"
            )

    def first(self, step: int) -> int:
        """The position of this process's first row in a step."""
        return (step * self.processes + self.process) * self.rows

    def num_steps(self, length: int) -> int:
        """The number of steps through `length` positions: `length / (rows * processes)` or more."""
        return -(-length // (self.rows * self.processes))
