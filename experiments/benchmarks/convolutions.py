"""Convolutions of common networks on this machine's processor: milliseconds of each.

    python experiments/benchmarks/convolutions.py --batch-size 8

Columns: XLA's own convolution; what this library makes of it, the same where that is not faster;
PyTorch's, channels last, if it is installed. Runs alternate, and the fastest of each counts.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

from gradnorm_jax.convolution import lower_convolutions

try:
    import torch
except ImportError:
    torch = None


class Convolution(NamedTuple):
    """A square one: extent and channels of the input, channels of the output, and the kernel."""

    size: int
    channels: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1


CONVOLUTIONS = {
    "stem, 7x7 stride 2": Convolution(224, 3, 64, 7, 2),
    "stem, 3x3 stride 2": Convolution(224, 3, 32, 3, 2),
    "1x1, large image": Convolution(56, 64, 256, 1),
    "1x1, small image": Convolution(14, 1024, 256, 1),
    "1x1 stride 2": Convolution(56, 256, 512, 1, 2),
    "3x3, large image": Convolution(56, 64, 64, 3),
    "3x3, small image": Convolution(14, 256, 256, 3),
    "3x3 stride 2": Convolution(56, 128, 128, 3, 2),
    "two groups, 5x5 (AlexNet)": Convolution(27, 96, 256, 5, 1, 2),
    "grouped 3x3 (ResNeXt)": Convolution(28, 256, 256, 3, 1, 32),
    "depthwise 3x3": Convolution(56, 144, 144, 3, 1, 144),
    "depthwise 3x3 stride 2": Convolution(112, 96, 96, 3, 2, 96),
    "depthwise 5x5 (EfficientNet)": Convolution(28, 240, 240, 5, 1, 240),
    "depthwise 7x7 (ConvNeXt)": Convolution(28, 192, 192, 7, 1, 192),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        batch_size: number of images.
        repetitions: runs of each.
        dtype: of images and kernels.
    """

    batch_size: int = 8
    repetitions: int = 10
    dtype: Literal["float32", "bfloat16"] = "float32"


def functions(convolution: Convolution, config: Config) -> dict[str, Callable[[], Any]]:
    """By column, what runs the convolution once."""
    size, channels, outputs, kernel, stride, groups = convolution
    generator = np.random.default_rng(0)
    x = generator.normal(size=(config.batch_size, size, size, channels)).astype(np.float32)
    weights = generator.normal(size=(kernel, kernel, channels // groups, outputs))
    weights = weights.astype(np.float32)
    padding = kernel // 2

    def convolve(x: jax.Array, weights: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    operands = jnp.asarray(x, config.dtype), jnp.asarray(weights, config.dtype)

    def compiled(function: Callable[..., jax.Array]) -> Callable[[], Any]:
        program = jax.jit(function).lower(*operands).compile()
        return lambda: jax.block_until_ready(program(*operands))

    columns = {"XLA": compiled(convolve), "gradnorm_jax": compiled(lower_convolutions(convolve))}
    if torch is not None:
        x, weights = (torch.from_numpy(a).to(getattr(torch, config.dtype)) for a in (x, weights))
        image = x.permute(0, 3, 1, 2)
        filters = weights.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)

        def convolve_in_torch() -> Any:
            with torch.inference_mode():
                return torch.nn.functional.conv2d(
                    image, filters, stride=stride, padding=padding, groups=groups
                )

        columns["PyTorch"] = convolve_in_torch
    return columns


def fastest(programs: dict[str, Callable[[], Any]], repetitions: int) -> list[float]:
    """Milliseconds of the fastest run of each, after one run to warm up."""
    seconds = dict.fromkeys(programs, float("inf"))
    for repetition in range(repetitions + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if repetition:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return [1e3 * value for value in seconds.values()]


def main(config: Config) -> None:
    """Prints the table."""
    rows = {name: functions(c, config) for name, c in CONVOLUTIONS.items()}
    table = Table(title=f"Batch {config.batch_size}, {config.dtype}, ms, jax {jax.__version__}")
    table.add_column("")
    for heading in next(iter(rows.values())):
        table.add_column(heading, justify="right")
    for name, programs in rows.items():
        times = fastest(programs, config.repetitions)
        table.add_row(name, *(f"{value:.2f}" for value in times))
    Console(width=100).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
