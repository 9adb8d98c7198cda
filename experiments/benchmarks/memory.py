"""Peak memory of a cache being written, scored and turned into figures.

    python experiments/benchmarks/memory.py --images 1000000

An in-distribution and an OOD set of that many images each have random features and logits in place
of images and a network. After each stage the time it took and the peak memory so far are printed.
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from gradnorm_jax.data.split import Split
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.cache import Cache, cached_feed
from gradnorm_jax.evaluation.evaluate import ID
from gradnorm_jax.evaluation.folder import open_folder
from gradnorm_jax.evaluation.passes import Execution, score_feed
from gradnorm_jax.evaluation.scoring import Chunk, Feed, score_outputs
from gradnorm_jax.evaluation.shards import in_folder
from gradnorm_jax.metrics import evaluate_scores
from gradnorm_jax.types import Head, Model, Outputs


def random_feed(name: str, length: int, features: int, classes: int, shift: float) -> Feed:
    """A data set without images."""

    def chunks(split: Split, start: int) -> Iterator[Chunk]:
        for step in range(start, split.num_steps(length)):
            rng = np.random.default_rng([length, step])
            outputs = Outputs._make(
                rng.standard_normal((split.rows, size), np.float32) + np.float32(shift)
                for size in (features, classes)
            )
            positions = np.arange(split.first(step), split.first(step) + split.rows)
            mask = positions < length
            ids = [f"{name}-{i:09}" for i in positions[mask]]
            data = outputs, outputs.logits.argmax(axis=1).astype(np.int32)
            yield Chunk(data, mask, positions[mask], ids, np.full(mask.sum(), -1, np.int32), [])

    return Feed(name, length, (), chunks, score_outputs)


def main(
    images: int = 1_000_000, features: int = 64, classes: int = 10, batch_size: int = 4096
) -> None:
    """Runs the stages.

    Args:
        images: in each of the two sets.
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

    head = Model(
        jax.tree_util.Partial(lambda params, images: images),
        {"kernel": jnp.zeros((features, classes))},
        Head(("kernel",)),
    )
    one, every = (
        parse_detectors(specs) for specs in (["msp"], ["msp", "odin", "energy", "gradnorm"])
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder, again = (open_folder(Path(temporary) / name) for name in ("cached", "again"))
        done(f"start, {images} + {images} images")
        tables = {}
        for name, shift in {ID: 0.1, "ood": 0.0}.items():
            feed = random_feed(name, images, features, classes, shift)
            collect = in_folder(folder, Cache(folder, "float32"))
            execution = Execution(batch_size=batch_size, collect=collect)
            tables[name] = score_feed(head, {}, feed, one, execution)
            done(f"{name}: cache written")
        scores = {}
        for name, table in tables.items():
            feed = cached_feed(folder, name, images, table)
            execution = Execution(batch_size=batch_size, collect=in_folder(again))
            scores[name] = score_feed(head, {}, feed, every, execution).scores["gradnorm"]
            done(f"{name}: scored from the cache")
        evaluate_scores(scores[ID], scores["ood"])
        done("figures of one detector")


if __name__ == "__main__":
    tyro.cli(main)
