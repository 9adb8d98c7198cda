"""Per-example gradient norms: time, memory and compilation of four ways to get them.

    python experiments/benchmarks/per_example.py --model bit_r50x1 --image-size 128 --batch-size 8

Rows: the ordinary gradient of the batch's mean loss, which every other row is measured against;
that gradient with the convolutions that this library puts in the place of XLA's on CPUs; this
library's norms, one for each parameter; the same through `vmap(grad)`; the same through `lax.map`
over single examples. Runs of all rows alternate, so that a busy machine slows all of them, and the
fastest of each counts. Memory is the compiler's figure for temporary values and results; the time
to compile is that of all cores, tracing included.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from gradnorm_jax.convolution import lower_convolutions
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.models import get_architecture
from gradnorm_jax.norms import entrywise_norm
from gradnorm_jax.per_example import per_example_grad_norms

Losses = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        model: a network of `gradnorm-jax models`; "scanned": a transformer of 12 equal blocks in
            one `nn.scan`, each computed again on the way back; or "googlenet", whose convolutions
            are nearly all of different shapes.
        image_size: height and width.
        batch_size: number of images.
        ord: order of the norm.
        microbatch_size: of this library's row; 0 for the whole batch at once.
        repetitions: runs of each row.
        one_by_one: measure the slow row of single examples too.
    """

    model: str = "bit_r50x1"
    image_size: int = 128
    batch_size: int = 8
    ord: float = 1
    microbatch_size: int = 0
    repetitions: int = 7
    one_by_one: bool = False


class Block(nn.Module):
    """Of a transformer, as `nn.scan` takes it."""

    heads: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """`[B, tokens, width]` of the same shape."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class Scanned(nn.Module):
    """A small transformer whose blocks hold their parameters in common leaves."""

    width: int = 192
    depth: int = 12
    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[B, C]`."""
        x = nn.Conv(self.width, (16, 16), (16, 16))(images)
        x = x.reshape(x.shape[0], -1, self.width)
        axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(Block), length=self.depth, **axes)()(x, None)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x.mean(axis=1)))


class ConvUnit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to `[B, H, W, features]`, or to a half of H and W."""
        kernel, strides = (self.size, self.size), (self.stride, self.stride)
        x = nn.Conv(self.features, kernel, strides, use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=True)(x))


class Inception(nn.Module):
    """Four branches side by side, as in GoogLeNet.

    Attributes:
        branches: features of the 1x1 convolution; of two convolutions, 1x1 and 3x3; of two more;
            of the 1x1 convolution after pooling.
    """

    branches: tuple[int, int, int, int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]`, of other C."""
        one, reduce_3, three, reduce_5, five, pooled = self.branches
        pool = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        parts = [
            ConvUnit(one)(x),
            ConvUnit(three, 3)(ConvUnit(reduce_3)(x)),
            ConvUnit(five, 5)(ConvUnit(reduce_5)(x)),
            ConvUnit(pooled)(pool),
        ]
        return jnp.concatenate(parts, axis=-1)


class GoogLeNet(nn.Module):
    """Szegedy et al. (2014), Table 1, with batch normalisation. https://arxiv.org/abs/1409.4842."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[B, C]`."""

        def halve(x: jax.Array) -> jax.Array:
            return nn.max_pool(x, (3, 3), (2, 2), "SAME")

        x = halve(ConvUnit(64, 7, 2)(images))
        x = halve(ConvUnit(192, 3)(ConvUnit(64)(x)))
        for branches in ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)):
            x = Inception(branches)(x)
        x = halve(x)
        for branches in (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ):
            x = Inception(branches)(x)
        x = halve(x)
        for branches in ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)):
            x = Inception(branches)(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


OWN_NETWORKS = {"scanned": Scanned, "googlenet": GoogLeNet}


def load(name: str, images: jax.Array) -> tuple[Losses, Any]:
    """The loss `[B]` of a network as Flax runs it, and its parameters at random."""
    own = OWN_NETWORKS.get(name)
    network = get_architecture(name).build(1000) if own is None else own()
    variables = jax.jit(network.init)(jax.random.key(0), images)
    statistics, params = flax.core.pop(variables, "params")

    def losses(params: Any, images: jax.Array) -> jax.Array:
        outputs = network.apply(statistics | {"params": params}, images)
        return kl_to_uniform(outputs if own else outputs.logits)

    return losses, params


def rows(config: Config, losses: Losses) -> dict[str, Callable[[Any, jax.Array], Any]]:
    """The functions `(params, images) -> result` by name; the first is the unit."""

    def gradient(params: Any, image: jax.Array) -> Any:
        return jax.grad(lambda params: losses(params, image[None])[0])(params)

    def norms(params: Any, image: jax.Array) -> Any:
        gradients = gradient(params, image)
        return jax.tree.map(lambda g: entrywise_norm(g[None], ord=config.ord)[0], gradients)

    def mean_gradient(losses: Losses) -> Callable[[Any, jax.Array], Any]:
        return jax.grad(lambda params, x: losses(params, x).mean())

    functions = {
        "gradient of the mean loss": mean_gradient(losses),
        "the same, faster convolutions": mean_gradient(lower_convolutions(losses)),
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


def compiled(function: Callable[..., Any], *operands: Any) -> tuple[Any, float]:
    """The compiled program, and the processors' seconds that it took."""
    start = time.process_time()
    program = jax.jit(function).lower(*operands).compile()
    return program, time.process_time() - start


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
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    losses, params = load(config.model, images)
    made = {
        name: compiled(function, params, images) for name, function in rows(config, losses).items()
    }
    programs = {name: program for name, (program, _) in made.items()}
    seconds = fastest(programs, (params, images), config.repetitions)
    (_, unit_of_compiling), unit = next(iter(made.values())), next(iter(seconds.values()))
    device = jax.devices()[0]
    table = Table(
        title=f"{config.model}, {config.image_size} px, batch {config.batch_size}, "
        f"ord {config.ord:g}, {device.device_kind} ({device.platform}), jax {jax.__version__}"
    )
    table.add_column("")
    for heading in ("ms", "ratio", "MB", "s to compile", "ratio"):
        table.add_column(heading, justify="right")
    for name, (program, compiling) in made.items():
        memory = program.memory_analysis()
        megabytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
        ratio, of_compiling = seconds[name] / unit, compiling / unit_of_compiling
        figures = (f"{1e3 * seconds[name]:.0f}", f"{ratio:.2f}", f"{megabytes:.0f}")
        table.add_row(name, *figures, f"{compiling:.1f}", f"{of_compiling:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
