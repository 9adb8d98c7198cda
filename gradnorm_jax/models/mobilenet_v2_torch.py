"""MobileNetV2 as torchvision has it, batch normalisation and padding included.

Variables carry torchvision's names: `features/2/conv/1/0/kernel` is its
`features.2.conv.1.0.weight`.

References:
    Sandler et al. (2018), "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.
    https://arxiv.org/abs/1801.04381
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import Layout
from gradnorm_jax.models.layers import batch_norm, convolve, linear
from gradnorm_jax.models.mobilenet_v2 import BLOCKS
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("classifier", "1", "kernel"), bias=("classifier", "1", "bias"))

layout: Layout = functools.partial(torch_layout, linear="classifier.1")
"""Where torchvision's files hold the variable at a path."""


class TorchMobileNetV2(nn.Module):
    """The network, with 1280 features.

    Attributes:
        num_classes: C.
        dtype: of the activations up to the pooling; batch statistics, pooling and head are in
            float32 at least.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Features `[B, 1280]` and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: normalised as in training.
            train: normalise by the statistics of the batch and update the collection
                `batch_stats`, in place of normalising by that. The dropout of training, before the
                head, is left out.
        """
        x = _Trunk(name="features")(images.astype(self.dtype), train)
        features = to_float32_at_least(x).mean(axis=(1, 2))
        return Outputs(features, _Classifier(self.num_classes, name="classifier")(features))


class _Trunk(nn.Module):
    """All but the head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = _ConvNormRelu(32, 3, stride=2, name="0")(x, train)
        for number, (expansion, channels, stride) in enumerate(BLOCKS, start=1):
            x = _Block(expansion, channels, stride, name=str(number))(x, train)
        return _ConvNormRelu(1280, 1, name=str(len(BLOCKS) + 1))(x, train)


class _Block(nn.Module):
    """An inverted residual; a shortcut where shapes allow."""

    expansion: int
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = _Layers(self.expansion, self.channels, self.stride, name="conv")(x, train)
        return x + y if x.shape == y.shape else y


class _Layers(nn.Module):
    """Expand 1x1 unless there is nothing to expand, depthwise 3x3, project 1x1."""

    expansion: int
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        inner = self.expansion * x.shape[-1]
        number = 0
        if self.expansion > 1:
            x = _ConvNormRelu(inner, 1, name="0")(x, train)
            number = 1
        x = _ConvNormRelu(inner, 3, stride=self.stride, groups=inner, name=str(number))(x, train)
        x = convolve(x, self.channels, 1, str(number + 1))
        return batch_norm(x, train, str(number + 2))


class _ConvNormRelu(nn.Module):
    """A convolution, batch normalisation, ReLU6."""

    channels: int
    size: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolve(x, self.channels, self.size, "0", stride=self.stride, groups=self.groups)
        return nn.relu6(batch_norm(x, train, "1"))


class _Classifier(nn.Module):
    """The head, which torchvision puts behind a dropout."""

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        return linear(features, self.num_classes, "1")
