"""DenseNet-BC of 32 x 32 images: "DenseNet-101" of the papers of DICE, ASH and VRA.

Variables carry the names of the widely used PyTorch files: `block1/layer/0/bn1/scale` is their
`block1.layer.0.bn1.weight`.

References:
    Huang et al. (2017), "Densely Connected Convolutional Networks".
    https://arxiv.org/abs/1608.06993
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import Layout
from gradnorm_jax.models.layers import avg_pool, batch_norm, convolve, linear
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("fc", "kernel"), bias=("fc", "bias"))

layout: Layout = functools.partial(torch_layout, linear="fc")
"""Where PyTorch's files hold the variable at a path."""


class CifarDenseNet(nn.Module):
    """The network, with 342 features at its usual depth and growth.

    Attributes:
        num_classes: C.
        depth: 100 or any other 6 n + 4; n layers in each of the three blocks.
        growth: channels that each layer adds.
        dtype: of the activations up to the pooling; batch statistics, pooling and head are in
            float32 at least.
    """

    num_classes: int
    depth: int = 100
    growth: int = 12
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
        layers, rest = divmod(self.depth - 4, 6)
        if rest or layers < 1:
            raise ValueError(f"depth must be 6 n + 4, such as 40 or 100, got {self.depth}")
        x = convolve(images.astype(self.dtype), 2 * self.growth, 3, "conv1")
        for number in (1, 2, 3):
            x = _Block(layers, self.growth, name=f"block{number}")(x, train)
            if number < 3:
                x = _Transition(name=f"trans{number}")(x, train)
        x = nn.relu(batch_norm(x, train, "bn1"))
        features = to_float32_at_least(x).mean(axis=(1, 2))
        return Outputs(features, linear(features, self.num_classes, "fc"))


class _Block(nn.Module):
    """Its layers in a scope of their own, as the files have them."""

    layers: int
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return _Layers(self.layers, self.growth, name="layer")(x, train)


class _Layers(nn.Module):
    """Layers each of which sees the channels of all before it."""

    layers: int
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index in range(self.layers):
            grown = _Layer(self.growth, name=str(index))(x, train)
            x = jnp.concatenate([x, grown], axis=-1)
        return x


class _Layer(nn.Module):
    """A 1x1 convolution to four times the channels that the 3x3 one adds."""

    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolve(nn.relu(batch_norm(x, train, "bn1")), 4 * self.growth, 1, "conv1")
        return convolve(nn.relu(batch_norm(x, train, "bn2")), self.growth, 3, "conv2")


class _Transition(nn.Module):
    """Half the channels, and half the pixels on a side."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolve(nn.relu(batch_norm(x, train, "bn1")), x.shape[-1] // 2, 1, "conv1")
        return avg_pool(x)
