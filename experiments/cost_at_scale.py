"""What an evaluation of ImageNet's size costs on other machines, from rates measured here.

    python experiments/cost_at_scale.py --core-gflops 36 --decode 90

The work of one image is counted by XLA. For each machine the table has the time of the network's
arithmetic, that of decoding JPEG files on its host's cores, and the longer of the two, where it
saturates. Nothing is communicated but files. The rates of accelerators are their makers' peaks
(bfloat16, dense) times a utilisation that is assumed, not measured.
"""

import functools
from typing import NamedTuple

import jax
import tyro
from rich.console import Console
from rich.table import Table

from gradnorm_jax.models import get_architecture, init_model

IMAGES = 50_000 + 35_640
"""ImageNet's validation images, and those of the paper's four OOD sets."""


class Machine(NamedTuple):
    """A machine, or several.

    Attributes:
        name: what it is called; a v4-128 has 64 chips.
        peak: of all its accelerators, in TFLOP/s; 0 for one that computes on its CPU.
        cores: of its hosts.
    """

    name: str
    peak: float
    cores: int


MACHINES = (
    Machine("1 CPU core", 0, 1),
    Machine("16 CPU cores", 0, 16),
    Machine("1 GPU (H100)", 989, 16),
    Machine("TPU v5e-8", 8 * 197, 224),
    Machine("TPU v4-128", 64 * 275, 16 * 240),
)


def gflop_per_image(model: str, image_size: int, num_classes: int) -> float:
    """The floating-point operations of a forward pass, in 1e9, as XLA counts them."""
    make = functools.partial(init_model, model, num_classes)
    network = jax.eval_shape(make, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jax.numpy.float32)
    forward = jax.jit(lambda network, images: network(images))
    return forward.lower(network, image).cost_analysis()["flops"] / 1e9


def main(
    core_gflops: float,
    decode: float,
    model: str = "bit_s_r101x1",
    norms: float = 3.1,
    utilisation: float = 0.3,
) -> None:
    """Prints the table.

    Args:
        core_gflops: what a CPU core achieves, in GFLOP/s: those of an image times the images per
            second of `experiments/benchmarks/throughput.py`, divided by the cores.
        decode: images that a core decodes and resizes in a second, from
            `experiments/benchmarks/loader.py`.
        model: a network known by name.
        norms: what all-layer gradient norms cost in forward passes, from
            `experiments/benchmarks/per_example.py`.
        utilisation: fraction of an accelerator's peak that is taken for granted.
    """
    architecture = get_architecture(model)
    size, classes = architecture.image_size, architecture.num_classes
    work = gflop_per_image(model, size, classes)
    table = Table(title=f"{IMAGES:,} images, {model} at {size} px, {work:.1f} GFLOP each")
    for name in ("", "forward, s", "all-layer norms, s", "decoding, s", "longest"):
        table.add_column(name, justify="right")
    for machine in MACHINES:
        rate = machine.peak * 1e3 * utilisation or core_gflops * machine.cores
        times = {
            "network": IMAGES * work / rate,
            "norms": IMAGES * norms * work / rate,
            "decoding": IMAGES / (decode * machine.cores),
        }
        longest = "decoding" if times["decoding"] > times["network"] else "network"
        table.add_row(machine.name, *(f"{seconds:,.0f}" for seconds in times.values()), longest)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
