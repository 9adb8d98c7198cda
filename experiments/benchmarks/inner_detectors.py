"""What detectors inside the network cost, in forward passes, beside the loops that they replace.

    python experiments/benchmarks/inner_detectors.py --model resnet20_cifar --image-size 32

Each is timed by itself, in turn, in one process, on random images and weights: in batches, by the
step of the evaluation and with the forward pass that all detectors share taken off; and in a loop
of one compiled call for each image. Both are divided by a plain compiled forward pass over the same
batches. The last row is all of them in one step, where they share what they read of the network.
Printed are medians of ratios measured side by side.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from detectors import medians, score_batches

from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.in_memory import fit_states
from gradnorm_jax.models import init_model, load_model

SPECS = (
    "odin(epsilon=0.0014)",
    "approximate_mass",
    "pro",
    "adascale_a",
    "gaia_z",
    "gaia_a",
    "nac_layers",
    "layer_norms",
    "layer_features+knn(k=5)",
    "mahalanobis_layers(layers=5)",
    "mahalanobis_layers(layers=5,magnitude=0)",
    "rankfeat",
    "gram",
    "gradient_projection",
)


def main(
    model: str = "resnet20_cifar",
    weights: Path | None = None,
    image_size: int = 32,
    batch_size: int = 32,
    num_batches: int = 2,
    num_classes: int = 10,
    loop_images: int = 8,
    repeats: int = 5,
    detectors: tuple[str, ...] = SPECS,
) -> None:
    """Times the detectors and prints the table.

    Args:
        model: architecture.
        weights: a file of its weights; random ones if None.
        image_size: side of the images in pixels.
        batch_size: of the network.
        num_batches: how many make up a round.
        num_classes: size of the last layer.
        loop_images: how many images the loop goes over, one after another.
        repeats: rounds, each of which times all ways.
        detectors: which.
    """
    if weights is None:
        network = init_model(model, num_classes, jax.random.key(0))
    else:
        network = load_model(model, weights)
    shape = (num_batches * batch_size, image_size, image_size, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = np.arange(len(images)) % num_classes
    batches = np.split(images, num_batches)
    known = parse_detectors(detectors)
    fits = [d for d in known if d.fit]
    states = fit_states(network, (images, labels), fits, batch_size=batch_size, progress=False)

    def forward() -> Any:
        return [network(jnp.asarray(each)) for each in batches]

    singles = [image[None] for image in images[:loop_images]]
    score = functools.partial(score_batches, network, states)
    ways: dict[str, Callable[[], Any]] = {"forward": forward}
    for each in known:
        ways[each.name] = functools.partial(score, (each,), batches)
        ways[f"{each.name}, loop"] = functools.partial(score, (each,), singles)
    ways["together"] = functools.partial(score, tuple(known), batches)
    times, ratios = medians(ways, repeats)
    device = jax.devices()[0].device_kind
    print(f"{model}, {image_size} px, batch {batch_size}, {device}")
    print(f"forward: {1e3 * times['forward'] / len(images):.2f} ms / image\n")
    print(f"{'time / forward':44}{'batched':>10}{'loop':>10}")
    for each in known:
        loop = ratios[f"{each.name}, loop"] * len(images) / loop_images
        print(f"{each.name:44}{ratios[each.name] - 1:10.2f}{loop - 1:10.2f}")
    print(f"{'together':44}{ratios['together'] - 1:10.2f}")


if __name__ == "__main__":
    tyro.cli(main)
