"""Peak memory of a cache being written, scored and turned into metrics.

    python experiments/benchmarks/memory.py --inputs 1000000

An in-distribution and an OOD set of that many inputs each are random features, and the network is
a random last layer. After each stage the time it took and the peak memory so far are printed.
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

import gradnorm_jax as gj


def random_batches(seed: int, length: int, features: int, shift: float) -> Iterator[np.ndarray]:
    """A data set that is made as it is read."""
    for start in range(0, length, 4096):
        rng = np.random.default_rng([seed, start])
        rows = rng.standard_normal((min(4096, length - start), features), np.float32)
        yield rows + np.float32(shift)


def main(
    inputs: int = 1_000_000, features: int = 64, classes: int = 10, batch_size: int = 4096
) -> None:
    """Runs the stages.

    Args:
        inputs: in each of the two sets.
        features: D.
        classes: C.
        batch_size: rows per step.
    """
    clock = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal clock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"{stage:<40}{time.perf_counter() - clock:8.1f} s {peak:8.0f} MiB", flush=True)
        clock = time.perf_counter()

    kernel = np.random.default_rng(0).standard_normal((features, classes), np.float32)
    model = gj.from_apply(lambda params, x: x @ params, kernel, np.zeros((2, features), np.float32))
    done(f"start, {inputs} + {inputs} inputs")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cached"
        gj.evaluate(
            model,
            lambda: random_batches(0, inputs, features, 0.1),
            {"ood": lambda: random_batches(1, inputs, features, 0.0)},
            detectors=["msp"],
            out=folder,
            cache="float32",
            batch_size=batch_size,
        )
        done("evaluated into a folder, with a cache")
        detectors = ["msp", "odin", "energy", "gradnorm"]
        gj.evaluate_cache(folder, detectors=detectors, out=Path(temporary) / "again")
        done("evaluated from the cache")


if __name__ == "__main__":
    tyro.cli(main)
