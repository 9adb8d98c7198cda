"""What GradNorm costs on top of the forward pass, and what it costs in the style of its first code.

    python experiments/benchmarks/throughput.py --model bit_r50x1 --image-size 224 --batch-size 8

Three ways are timed in turn, in one process, on random images and weights:

- forward: a plain loop over batches in memory, features and logits of each, compiled.
- evaluate: `gradnorm_jax.evaluate` of the same batches, half of them as ID and half as OOD data,
  with GradNorm as its only detector; metrics included.
- one by one: batch 1 and a backward pass through the whole network, of which only the last layer's
  gradient is used; the way of the authors' published code. Of one batch alone.

Printed are medians of images per second, and ratios of the times measured side by side.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import gradnorm_jax as gj
from gradnorm_jax.data.preprocess import Preprocess, get_preprocess, scale
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.models import MODELS, init_model
from gradnorm_jax.sharding import batch_mesh
from gradnorm_jax.tree import Params, get_leaf
from gradnorm_jax.types import Model, Outputs


@functools.partial(jax.jit, static_argnames="preprocess")
def forward(model: Model, pixels: jax.Array, preprocess: Preprocess) -> Outputs:
    """Features and logits of `[B, H, W, 3]`."""
    return model(scale(pixels, preprocess))


@functools.partial(jax.jit, static_argnames="preprocess")
def one_by_one(model: Model, pixels: jax.Array, preprocess: Preprocess) -> tuple[jax.Array, Params]:
    """The score of one image, `[1, H, W, 3] -> []`, and the gradients of all parameters."""

    def loss(params: Params) -> jax.Array:
        return kl_to_uniform(model.apply(params, scale(pixels, preprocess)).logits)[0]

    gradients = jax.grad(loss)(model.params)
    # All are returned, or the compiler would drop the backward pass through the body.
    return jnp.abs(get_leaf(gradients, model.head.kernel)).sum(), gradients


def seconds(work: Callable[[], Any]) -> float:
    """The time that `work` takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def main(
    model: str = "bit_r50x1",
    image_size: int = 224,
    batch_size: int = 8,
    num_batches: int = 4,
    num_classes: int = 1000,
    repeats: int = 5,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Times the three ways and prints the table.

    Args:
        model: architecture.
        image_size: side of the images in pixels.
        batch_size: of the first two ways; also the number of images that the third one takes.
        num_batches: of the first two ways, an even number.
        num_classes: size of the last layer.
        repeats: rounds, each of which times all three.
        dtype: of the activations.
    """
    network = init_model(model, num_classes, jax.random.key(0), dtype=dtype)
    preprocess = get_preprocess(MODELS[model].preprocess)
    # The images have the network's size already: they are only scaled.
    prepare = functools.partial(scale, preprocess=preprocess)
    shape = (num_batches, batch_size, image_size, image_size, 3)
    batches = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    half = num_batches // 2 * batch_size
    images = batches.reshape(-1, *shape[2:])

    def evaluate() -> Any:
        return gj.evaluate(
            network,
            images[:half],
            {"ood": images[half:]},
            detectors=["gradnorm"],
            preprocess=prepare,
            batch_size=batch_size,
            mesh=batch_mesh(jax.devices()[:1]),
            progress=False,
        ).scores

    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "forward": (
            len(images),
            lambda: [jax.device_get(forward(network, x, preprocess)) for x in batches],
        ),
        "evaluate": (len(images), evaluate),
        "one by one": (
            batch_size,
            lambda: [one_by_one(network, jnp.asarray(x[None]), preprocess) for x in batches[0]],
        ),
    }
    for _, work in ways.values():
        seconds(work)  # compiles
    rounds = [
        {name: seconds(work) / count for name, (count, work) in ways.items()}
        for _ in range(repeats)
    ]
    print(f"{model}, {image_size} px, batch {batch_size}, {jax.devices()[0].device_kind}")
    print(f"{'':12}{'images/s':>10}{'time / forward':>16}")
    for name in ways:
        speed = 1 / statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["forward"] for times in rounds)
        print(f"{name:12}{speed:10.2f}{ratio:16.3f}")


if __name__ == "__main__":
    tyro.cli(main)
