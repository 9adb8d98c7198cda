"""The ResNet of 32 x 32 images, with shortcuts that have no parameters.

Variables carry the names of the widely used PyTorch files: `layer1/0/conv1/kernel` is their
`layer1.0.conv1.weight`.

References:
    He et al. (2016), "Deep Residual Learning for Image Recognition", section 4.2, shortcuts of
    option A. https://arxiv.org/abs/1512.03385
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

HEAD = Head(kernel=("linear", "kernel"), bias=("linear", "bias"))

layout: Layout = functools.partial(torch_layout, linear="linear")
"""Where PyTorch's files hold the variable at a path."""


class CifarResNet(nn.Module):
    """The network, with 64 features.

    Attributes:
        num_classes: C.
        depth: 20, 32, 44, 56, 110 or any other 6 n + 2; n blocks in each of the three layers.
        dtype: of the activations up to the pooling; batch statistics, pooling and head are in
            float32 at least.
    """

    num_classes: int
    depth: int = 20
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Features `[B, 64]` and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: normalised as in training.
            train: normalise by the statistics of the batch and update the collection
                `batch_stats`, in place of normalising by that.

        Raises:
            ValueError: the depth is not 6 n + 2.
        """
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or not blocks:
            raise ValueError(f"depth must be 6 n + 2, such as 20 or 56, got {self.depth}")
        x = convolve(images.astype(self.dtype), 16, 3, "conv1")
        x = nn.relu(batch_norm(x, train, "bn1"))
        for index in range(3):
            stride = 1 if index == 0 else 2
            block = functools.partial(_Block, 16 * 2**index)
            x = Stage(block, blocks, stride, name=f"layer{index + 1}")(x, train)
        features = to_float32_at_least(x).mean(axis=(1, 2))
        return Outputs(features, linear(features, self.num_classes, "linear"))


class _Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is thinned and padded."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = convolve(x, self.channels, 3, "conv1", stride=self.stride)
        y = nn.relu(batch_norm(y, train, "bn1"))
        y = batch_norm(convolve(y, self.channels, 3, "conv2"), train, "bn2")
        padding = (self.channels - x.shape[-1]) // 2
        shortcut = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (padding, padding))))
