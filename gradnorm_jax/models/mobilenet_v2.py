"""MobileNetV2 1.0 with batch normalisation folded into the convolutions.

References:
    Sandler et al. (2018), "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.
    https://arxiv.org/abs/1801.04381
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import CheckpointEntry
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.tree import Path
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("head", "kernel"), bias=("head", "bias"))

# (expansion, output channels, repetitions, stride of the first) of the inverted residuals.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
BLOCKS = tuple(
    (expansion, channels, stride if repetition == 0 else 1)
    for expansion, channels, repetitions, stride in _STAGES
    for repetition in range(repetitions)
)


class MobileNetV2(nn.Module):
    """The network, with 1280 features.

    Convolutions pad as TensorFlow's SAME does. The blocks are `block01` to `block17`, each with
    `expand` (absent in the first), `depthwise` and `project`.

    Attributes:
        num_classes: C; 1001 in the published weights, whose class 0 is the background.
        dtype: of the activations up to the pooling; pooling and head are in float32 at least.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        """Features `[B, 1280]` and logits `[B, C]` of `images` `[B, H, W, 3]`."""
        x = nn.Conv(32, (3, 3), strides=2, dtype=self.dtype, name="stem")(images)
        x = nn.relu6(x)
        for index, (expansion, channels, stride) in enumerate(BLOCKS):
            name = _block_name(index)
            x = _InvertedResidual(expansion, channels, stride, self.dtype, name=name)(x)
        x = nn.relu6(nn.Conv(1280, (1, 1), dtype=self.dtype, name="last")(x))
        features = to_float32_at_least(x).mean(axis=(1, 2))
        head = nn.Conv(self.num_classes, (1, 1), dtype=features.dtype, name="head")
        return Outputs(features, head(features[:, None, None, :])[:, 0, 0, :])


def layout(path: Path) -> CheckpointEntry:
    """Where a file in the layout of the converted TFLite weights holds the parameter at `path`.

    Its keys are `NN_{CONV_2D,DEPTHWISE_CONV_2D}_{w,b}`, NN counting in order of execution; dense
    kernels are `[out, h, w, in]`, depthwise ones `[1, h, w, channels]`.
    """
    *layer, name = map(str, path)
    number = _NUMBERS["/".join(layer)]
    depthwise = layer[-1] == "depthwise"
    key = f"{number:02d}_DEPTHWISE_CONV_2D" if depthwise else f"{number:02d}_CONV_2D"
    if name == "bias":
        return CheckpointEntry(f"{key}_b")
    return CheckpointEntry(f"{key}_w", axes=(1, 2, 0, 3) if depthwise else (1, 2, 3, 0))


class _InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation; a shortcut where shapes allow."""

    expansion: int
    channels: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        inner = self.expansion * x.shape[-1]
        if self.expansion > 1:
            x = nn.relu6(nn.Conv(inner, (1, 1), dtype=self.dtype, name="expand")(x))
        x = nn.Conv(
            inner,
            (3, 3),
            strides=self.stride,
            feature_group_count=inner,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        x = nn.relu6(x)
        x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="project")(x)
        return x + shortcut if x.shape == shortcut.shape else x


def _block_name(index: int) -> str:
    return f"block{index + 1:02d}"


def _layers() -> Iterator[str]:
    """Names of the convolutions in order of execution."""
    yield "stem"
    for index, (expansion, _, _) in enumerate(BLOCKS):
        names = ("expand", "depthwise", "project") if expansion > 1 else ("depthwise", "project")
        yield from (f"{_block_name(index)}/{name}" for name in names)
    yield from ("last", "head")


_NUMBERS = {layer: number for number, layer in enumerate(_layers())}
