"""What an exported detector costs beside the same detector in process.

    python experiments/benchmarks/export.py --model mobilenet_v2 --weights mobilenet_v2.npz

Both are compiled for each batch size, and then called in turn. Printed are the time of each
compilation, medians of the time per call, and the median of their ratios; `called` is the exported
detector without `jax.jit` around it. Weights are random, if none are given.
"""

import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from throughput import seconds

import gradnorm_jax as gj
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.models import MODELS, init_model
from gradnorm_jax.models.named import load_named


def main(
    model: str = "resnet20_cifar",
    weights: Path | None = None,
    detector: str = "gradnorm",
    num_classes: int = 10,
    batch_sizes: tuple[int, ...] = (1, 32),
    repeats: int = 30,
) -> None:
    """Times both and prints the table.

    Args:
        model: architecture.
        weights: of it.
        detector: one that is not fitted.
        num_classes: size of the last layer, of random weights.
        batch_sizes: how many images at once.
        repeats: rounds, each of which calls all of them.
    """
    if weights is None:
        network = init_model(model, num_classes, jax.random.key(0))
    else:
        network = load_named(model, weights, "float32").model
    preprocess = get_preprocess(MODELS[model].preprocess)
    scores = jnp.linspace(0, 1, 5000)
    fitted = gj.fit(detector, network)
    calibrated = gj.Calibrated(fitted, scores, scores[250], 0.95, 0.95, False, preprocess)

    start = time.perf_counter()
    content = bytes(gj.export_detector(calibrated).serialize())
    exported_in = time.perf_counter() - start
    exported = jax.export.deserialize(content)
    loaded_in = time.perf_counter() - start - exported_in
    print(
        f"{detector} on {model}, {preprocess.size} px, {jax.default_backend()}, {len(content):,} B"
    )
    print(f"exported in {exported_in:.2f} s, read in {loaded_in * 1e3:.1f} ms")
    print(f"{'batch':>5} {'':10} {'compile s':>9} {'call ms':>8} {'ratio':>6}")
    shape = (preprocess.size, preprocess.size, 3)
    for size in batch_sizes:
        images = np.random.default_rng(0).integers(256, size=(size, *shape), dtype=np.uint8)
        decide, call = jax.jit(gj.Calibrated.decide), jax.jit(exported.call)
        ways = {
            "in process": lambda images=images, decide=decide: decide(calibrated, images),
            "exported": lambda images=images, call=call: call(images),
            "called": lambda images=images: exported.call(images),
        }
        first = {name: seconds(way) for name, way in ways.items()}
        times = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
        for name in ways:
            took = statistics.median(each[name] for each in times)
            ratio = statistics.median(each[name] / each["in process"] for each in times)
            print(f"{size:5} {name:10} {first[name]:9.2f} {took * 1e3:8.2f} {ratio:6.2f}")


if __name__ == "__main__":
    tyro.cli(main)
