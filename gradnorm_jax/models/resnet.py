"""ResNet as torchvision has it, and its form for images of 32 x 32 pixels.

Variables carry torchvision's names: `layer1/0/downsample/1/scale` is its
`layer1.0.downsample.1.weight`.

References:
    He et al. (2016), "Deep Residual Learning for Image Recognition". The stride of a bottleneck is
    on its 3x3 convolution, unlike there. https://arxiv.org/abs/1512.03385
    Zagoruyko, Komodakis (2016), "Wide Residual Networks". https://arxiv.org/abs/1605.07146
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import CheckpointEntry, Layout
from gradnorm_jax.models.layers import batch_norm, convolve, linear, max_pool
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.tree import Path
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("fc", "kernel"), bias=("fc", "bias"))

layout: Layout = functools.partial(torch_layout, linear="fc")
"""Where torchvision's files hold the variable at a path."""


class ResNet(nn.Module):
    """The network, with 512 features, or 2048 of bottlenecks.

    Attributes:
        num_classes: C.
        depths: blocks in each of the four layers, (2, 2, 2, 2) for ResNet-18.
        bottleneck: blocks of 1x1, 3x3 and 1x1 in place of two 3x3 convolutions.
        widen: what the inner channels of bottlenecks are multiplied by.
        small_images: a stem of one 3x3 convolution, in place of 7x7 with stride and pooling.
        dtype: of the activations up to the pooling; batch statistics, pooling and head are in
            float32 at least.
    """

    num_classes: int
    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    widen: int = 1
    small_images: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: normalised as in training.
            train: normalise by the statistics of the batch and update the collection
                `batch_stats`, in place of normalising by that.
        """
        size, stride = (3, 1) if self.small_images else (7, 2)
        x = convolve(images.astype(self.dtype), 64, size, "conv1", stride=stride)
        x = nn.relu(batch_norm(x, train, "bn1"))
        if not self.small_images:
            x = max_pool(x)
        for index, depth in enumerate(self.depths):
            block = _Block(64 * 2**index, 1 if index == 0 else 2, self.bottleneck, self.widen)
            x = _Layer(depth, block, name=f"layer{index + 1}")(x, train)
        features = to_float32_at_least(x).mean(axis=(1, 2))
        return Outputs(features, linear(features, self.num_classes, "fc"))


def openood_layout(path: Path) -> CheckpointEntry:
    """Where OpenOOD's files for 32 x 32 images hold the variable at `path`."""
    return layout(tuple("shortcut" if key == "downsample" else key for key in path))


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the first block of a layer is made of; the others have no stride."""

    channels: int
    stride: int
    bottleneck: bool
    widen: int


class _Layer(nn.Module):
    """A number of blocks, the first of which has the stride."""

    depth: int
    block: _Block

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index in range(self.depth):
            stride = self.block.stride if index == 0 else 1
            x = _Residual(dataclasses.replace(self.block, stride=stride), name=str(index))(x, train)
        return x


class _Residual(nn.Module):
    """Two 3x3 convolutions or a bottleneck, beside a shortcut that has their shape."""

    block: _Block

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels, stride = self.block.channels, self.block.stride
        layers = [(channels, 3, stride), (channels, 3, 1)]
        if self.block.bottleneck:
            inner = channels * self.block.widen
            layers = [(inner, 1, 1), (inner, 3, stride), (4 * channels, 1, 1)]
        y = x
        for number, (width, size, step) in enumerate(layers, start=1):
            y = y if number == 1 else nn.relu(y)
            y = convolve(y, width, size, f"conv{number}", stride=step)
            y = batch_norm(y, train, f"bn{number}")
        if x.shape != y.shape:
            x = _Projection(y.shape[-1], stride, name="downsample")(x, train)
        return nn.relu(x + y)


class _Projection(nn.Module):
    """A shortcut to another shape."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return batch_norm(convolve(x, self.channels, 1, "0", stride=self.stride), train, "1")
