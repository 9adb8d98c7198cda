"""What a process holds of each statistic that detectors learn, and sends when they are merged.

    python experiments/benchmarks/statistics_memory.py

Of a few examples at 2,048 features and at 1,000 and 21,843 classes: the sizes do not depend on how
many there are, but for those that grow until they reach a bound, which is said. Each of several
processes keeps its statistics in a file of this size, and reads those of all others once.
"""

import jax
import numpy as np
import tyro

from gradnorm_jax.detectors import DETECTORS, parse_detectors
from gradnorm_jax.statistics import Examples, Statistic, learn, passes
from gradnorm_jax.types import LinearHead

BY_FORMULA = {
    "softmax covariances": "8 C^2 bytes, {classes:,.0f} MB for the most classes",
    "bank": "4 (D + 5) bytes a row, {bank:,.0f} MB at 50,000",
    "sums by true and predicted": "8 (D + 3) bytes a pair that occurs",
    "softmax sums": "8 C bytes a class that is predicted, {classes:,.0f} MB with all",
}


def megabytes(statistic: Statistic, num_features: int, num_classes: int) -> float:
    """The size of a statistic of eight examples."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(num_features, num_classes))
    labels = np.arange(8, dtype=np.int32)
    features = rng.random((8, num_features)).astype(np.float32)
    examples = Examples(features, (features @ kernel).astype(np.float32), labels, np.arange(8))
    value = learn([statistic], LinearHead(kernel, np.zeros(num_classes)), [examples])[statistic]
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(value)) / 1e6


def main(num_features: int = 2048, num_classes: tuple[int, ...] = (1000, 21_843)) -> None:
    """Prints the sizes in MB.

    Args:
        num_features: D.
        num_classes: C, one column for each.
    """
    names = [name for name, row in DETECTORS.items() if not row.example]
    known = [s for d in parse_detectors(names) if d.fit for s in d.fit.statistics]
    statistics = {s.name: s for level in passes(known) for s in level}
    header = "".join(f"{f'C = {each:,}':>14}" for each in num_classes)
    print(f"{f'MB at D = {num_features:,}':44}{header}")
    sizes = {
        "bank": 50_000 * 4 * (num_features + 5) / 1e6,
        "classes": 8 * max(num_classes) ** 2 / 1e6,
    }
    for name, statistic in sorted(statistics.items()):
        grows = next((text for start, text in BY_FORMULA.items() if name.startswith(start)), None)
        if grows is not None:
            print(f"{name:44}{grows.format(**sizes):>14}")
            continue
        cells = [f"{megabytes(statistic, num_features, each):14,.1f}" for each in num_classes]
        print(f"{name:44}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
