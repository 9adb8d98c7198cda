"""Whether decoding keeps the network busy, and the network the decoding.

    python experiments/benchmarks/loader.py --images imagenet/val --model bit_r101x1

Three things are timed on the images of a folder, in turn and in one process, in images per second:

- decode: the loader alone, from files to pixels in host memory.
- compute: the compiled step of `gradnorm-jax evaluate` with GradNorm, on pixels that are there.
- together: `gradnorm-jax evaluate` itself, from files to scores.

The last line is how much of the slower of the two the whole achieves; 1 means that the other costs
nothing. On a CPU both share the same cores, so it is less there.
"""

import time
from collections.abc import Callable

import jax
import tyro

from gradnorm_jax.data.loader import batches
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.sources import open_source
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.passes import Execution, score_feed
from gradnorm_jax.evaluation.scoring import image_feed, score_pixels
from gradnorm_jax.models import ARCHITECTURES, init_model
from gradnorm_jax.sharding import batch_mesh, put_batch, put_replicated


def main(
    images: str, model: str = "bit_r101x1", batch_size: int = 64, num_classes: int = 1000
) -> None:
    """Times the three and prints the table.

    Args:
        images: as for `gradnorm-jax evaluate`.
        model: architecture, with random weights.
        batch_size: of all devices, a multiple of their number.
        num_classes: size of the last layer.
    """
    source = open_source(images)
    preprocess = get_preprocess(ARCHITECTURES[model].preprocess)
    mesh, detectors = batch_mesh(), parse_detectors(["gradnorm"])
    network = put_replicated(mesh, init_model(model, num_classes, jax.random.key(0)))
    steps = -(-len(source) // batch_size)
    pixels = put_batch(mesh, next(iter(batches(source, preprocess, batch_size))).pixels)

    def decode() -> None:
        for _ in batches(source, preprocess, batch_size):
            pass

    def compute() -> None:
        for _ in range(steps):
            scored = score_pixels(
                network, {}, pixels, detectors=detectors, preprocess=preprocess, mesh=mesh
            )
        jax.block_until_ready(scored)

    def together() -> None:
        feed = image_feed("ID", source, preprocess)
        score_feed(network, {}, feed, detectors, Execution(mesh=mesh, batch_size=batch_size))

    together()  # compiles
    speeds = {work.__name__: len(source) / seconds(work) for work in (decode, compute, together)}
    for name, speed in speeds.items():
        print(f"{name:10}{speed:10.2f} images/s")
    slower = min(speeds["decode"], speeds["compute"])
    print(f"together / slower of the two: {speeds['together'] / slower:.3f}")


def seconds(work: Callable[[], None]) -> float:
    """The time that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
