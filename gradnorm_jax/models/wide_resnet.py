"""WideResNet of 32 x 32 images, the pre-activation ResNet with few and wide layers.

Variables carry the names of the widely used PyTorch files: `block1/layer/0/bn1/scale` is their
`block1.layer.0.bn1.weight`.

References:
    Zagoruyko, Komodakis (2016), "Wide Residual Networks". https://arxiv.org/abs/1605.07146
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import Layout
from gradnorm_jax.models.layers import Stage, batch_norm, convolve, linear
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("fc", "kernel"), bias=("fc", "bias"))

layout: Layout = functools.partial(torch_layout, linear="fc")
"""Where PyTorch's files hold the variable at a path."""


class WideResNet(nn.Module):
    """The network, with 64 times `widen` features.

    Attributes:
        num_classes: C.
        depth: 40 or any other 6 n + 4; n units in each of the three blocks.
        widen: what the channels 16, 32 and 64 of the blocks are multiplied by.
        dtype: of the activations up to the pooling; batch statistics, pooling and head are in
            float32 at least.
    """

    num_classes: int
    depth: int = 40
    widen: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: normalised as in training.
            train: normalise by the statistics of the batch and update the collection
                `batch_stats`, in place of normalising by that.

        Raises:
            ValueError: the depth is not 6 n + 4.
        """
        units, rest = divmod(self.depth - 4, 6)
        if rest or units < 1:
            raise ValueError(f"depth must be 6 n + 4, such as 28 or 40, got {self.depth}")
        x = convolve(images.astype(self.dtype), 16, 3, "conv1")
        for index in range(3):
            channels, stride = 16 * self.widen * 2**index, 1 if index == 0 else 2
            x = _Block(units, channels, stride, name=f"block{index + 1}")(x, train)
        x = nn.relu(batch_norm(x, train, "bn1"))
        features = to_float32_at_least(x).mean(axis=(1, 2))
        return Outputs(features, linear(features, self.num_classes, "fc"))


class _Block(nn.Module):
    """Its units in a scope of their own, as the files have them."""

    units: int
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        unit = functools.partial(_Unit, self.channels)
        return Stage(unit, self.units, self.stride, name="layer")(x, train)


class _Unit(nn.Module):
    """Two 3x3 convolutions; where the channels change, the shortcut is of what is activated."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        activated = nn.relu(batch_norm(x, train, "bn1"))
        if x.shape[-1] != self.channels:
            x = convolve(activated, self.channels, 1, "convShortcut", stride=self.stride)
        y = convolve(activated, self.channels, 3, "conv1", stride=self.stride)
        y = convolve(nn.relu(batch_norm(y, train, "bn2")), self.channels, 3, "conv2")
        return x + y
