"""Per-example gradient norms of a ResNetV2-50 (BiT): time and memory of four ways to get them.

    python experiments/benchmarks/per_example.py --image-size 128 --batch-size 8

Rows: the ordinary gradient of the batch's mean loss, which every other row is measured against;
this library's norms, one for each parameter; the same through `vmap(grad)`; the same through
`lax.map` over single examples. Runs of all rows alternate, so that a busy machine slows all of
them, and the fastest of each counts. Memory is the compiler's figure for temporary values and
results.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.models.bit import BiT
from gradnorm_jax.norms import entrywise_norm
from gradnorm_jax.per_example import per_example_grad_norms


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        image_size: height and width.
        batch_size: number of images.
        depths: units in each block of the network.
        ord: order of the norm.
        microbatch_size: of this library's row; 0 for the whole batch at once.
        repetitions: runs of each row.
        one_by_one: measure the slow row of single examples too.
    """

    image_size: int = 128
    batch_size: int = 8
    depths: tuple[int, ...] = (3, 4, 6, 3)
    ord: float = 1
    microbatch_size: int = 0
    repetitions: int = 7
    one_by_one: bool = False


def rows(config: Config, network: BiT) -> dict[str, Callable[[Any, jax.Array], Any]]:
    """The functions `(params, images) -> result` by name; the first is the unit."""

    def losses(params: Any, images: jax.Array) -> jax.Array:
        return kl_to_uniform(network.apply({"params": params}, images).logits)

    def gradient(params: Any, image: jax.Array) -> Any:
        return jax.grad(lambda params: losses(params, image[None])[0])(params)

    def norms(params: Any, image: jax.Array) -> Any:
        gradients = gradient(params, image)
        return jax.tree.map(lambda g: entrywise_norm(g[None], ord=config.ord)[0], gradients)

    functions = {
        "gradient of the mean loss": jax.grad(lambda params, x: losses(params, x).mean()),
        "per_example_grad_norms": lambda params, images: per_example_grad_norms(
            losses,
            params,
            images,
            ord=config.ord,
            microbatch_size=config.microbatch_size or None,
        ),
        "vmap(grad), then norms": jax.vmap(norms, (None, 0)),
    }
    if config.one_by_one:
        functions["lax.map(grad), then norms"] = lambda params, images: jax.lax.map(
            lambda image: norms(params, image), images
        )
    return functions


def fastest(
    programs: dict[str, Callable[..., Any]], operands: tuple[Any, ...], repetitions: int
) -> dict[str, float]:
    """Seconds of the fastest run of each program, after one run to warm up."""
    seconds = dict.fromkeys(programs, float("inf"))
    for repetition in range(repetitions + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            if repetition:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main(config: Config) -> None:
    """Prints the table."""
    network = BiT(num_classes=1000, depths=config.depths)
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape)
    params = jax.jit(network.init)(jax.random.key(1), images)["params"]
    programs = {
        name: jax.jit(function).lower(params, images).compile()
        for name, function in rows(config, network).items()
    }
    seconds = fastest(programs, (params, images), config.repetitions)
    unit = next(iter(seconds.values()))
    device = jax.devices()[0]
    table = Table(
        title=f"ResNetV2 {config.depths}, {config.image_size} px, batch {config.batch_size}, "
        f"ord {config.ord:g}, {device.device_kind} ({device.platform}), jax {jax.__version__}"
    )
    table.add_column("")
    for heading in ("ms", "ratio", "MB"):
        table.add_column(heading, justify="right")
    for name, program in programs.items():
        memory = program.memory_analysis()
        megabytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
        ratio = seconds[name] / unit
        table.add_row(name, f"{1e3 * seconds[name]:.0f}", f"{ratio:.2f}", f"{megabytes:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
