"""Whether decoding keeps the network busy, and the network the decoding.

    python experiments/benchmarks/loader.py --images imagenet/val --model bit_r101x1

Three things are timed on the images of a folder, by turns and in one process, in images per second:

- decode: the loader alone, from files to pixels in host memory.
- compute: the compiled step of `gradnorm-jax evaluate` with GradNorm, on pixels that are there.
- together: `gradnorm-jax evaluate` itself, from files to scores.

Each is the median of several rounds. The last line is how much of the slower of the two the whole
achieves; 1 means that the other costs nothing. On a CPU both share the same cores, so it is less
there.
"""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import tyro

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source_stream import available_cpus
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.loop import Execution, score
from gradnorm_jax.evaluation.step import place_model, put_batch, score_batch
from gradnorm_jax.models import MODELS, init_model

_FEWEST_BATCHES = 10


def main(
    images: str,
    model: str = "bit_r101x1",
    batch_size: int = 64,
    num_classes: int = 1000,
    rounds: int = 5,
    workers: int = available_cpus(),
    worker_processes: bool = False,
) -> None:
    """Times the three and prints the table.

    Args:
        images: as for `gradnorm-jax evaluate`.
        model: architecture, with random weights.
        batch_size: of all devices, a multiple of their number.
        num_classes: size of the last layer.
        rounds: how often each is timed.
        workers: how many images are decoded at once.
        worker_processes: decode in processes in place of threads.
    """
    preprocess = get_preprocess(MODELS[model].preprocess)
    stream = as_stream(images, preprocess, workers=workers, worker_processes=worker_processes)
    schedule, length = BatchSchedule(batch_size), stream.length or 0
    if length < _FEWEST_BATCHES * batch_size:
        raise SystemExit(
            f"of {length} images in batches of {batch_size} most pass before decoding and "
            f"computing overlap: give {_FEWEST_BATCHES * batch_size} images or more"
        )
    network, placement = place_model(init_model(model, num_classes, jax.random.key(0)))
    detectors = parse_detectors(["gradnorm"])
    execution = Execution(placement, schedule, preprocess)
    shape = (batch_size, preprocess.size, preprocess.size, 3)
    pixels = put_batch(
        np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8), placement
    )

    def decode() -> None:
        for _ in stream.batches(schedule):
            pass

    def compute() -> None:
        for _ in schedule.taken(length):
            scored = score_batch(
                network,
                {},
                pixels,
                detectors=detectors,
                preprocess=preprocess,
                placement=placement,
            )
        jax.block_until_ready(scored)

    def together() -> None:
        for _ in score("ID", stream, network, {}, detectors, execution):
            pass

    compute()  # compiles
    works = (decode, compute, together)
    times = [[seconds(work) for work in works] for _ in range(rounds)]
    speeds = [length / statistics.median(each) for each in zip(*times, strict=True)]
    kind = "processes" if worker_processes else "threads"
    print(f"{model}, {jax.device_count()} x {jax.devices()[0].device_kind}, {workers} {kind}")
    for work, speed in zip(works, speeds, strict=True):
        print(f"{work.__name__:10}{speed:10.2f} images/s")
    print(f"together / slower of the two: {speeds[2] / min(speeds[:2]):.3f}")


def seconds(work: Callable[[], None]) -> float:
    """The time that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
