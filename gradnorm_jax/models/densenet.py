"""DenseNet as torchvision has it.

Variables carry torchvision's names: `features/denseblock1/denselayer1/norm1/scale` is its
`features.denseblock1.denselayer1.norm1.weight`.

References:
    Huang et al. (2017), "Densely Connected Convolutional Networks".
    https://arxiv.org/abs/1608.06993
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import Layout
from gradnorm_jax.models.layers import avg_pool, batch_norm, convolve, linear, max_pool
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.types import Head, Outputs
from gradnorm_jax.weights.stored import Checkpoint

HEAD = Head(kernel=("classifier", "kernel"), bias=("classifier", "bias"))

layout: Layout = functools.partial(torch_layout, linear="classifier")
"""Where torchvision's files hold the variable at a path."""


class DenseNet(nn.Module):
    """The network, with 1024 features at its usual depths.

    Attributes:
        num_classes: C.
        depths: layers in each block, (6, 12, 24, 16) for DenseNet-121.
        growth: channels that each layer adds.
        dtype: of the activations up to the pooling; batch statistics, pooling and head are in
            float32 at least.
    """

    num_classes: int
    depths: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: normalised as in training.
            train: normalise by the statistics of the batch and update the collection
                `batch_stats`, in place of normalising by that.
        """
        trunk = _Trunk(self.depths, self.growth, name="features")
        x = trunk(images.astype(self.dtype), train)
        features = to_float32_at_least(nn.relu(x)).mean(axis=(1, 2))
        return Outputs(features, linear(features, self.num_classes, "classifier"))


def clean(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the names of older files (`denselayer1.norm.1`) made those of today."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): array
        for key, array in checkpoint.items()
    }


class _Trunk(nn.Module):
    """All but the head."""

    depths: tuple[int, ...]
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolve(x, 2 * self.growth, 7, "conv0", stride=2)
        x = max_pool(nn.relu(batch_norm(x, train, "norm0")))
        for number, depth in enumerate(self.depths, start=1):
            x = _Block(depth, self.growth, name=f"denseblock{number}")(x, train)
            if number < len(self.depths):
                x = _Transition(name=f"transition{number}")(x, train)
        return batch_norm(x, train, f"norm{len(self.depths) + 1}")


class _Block(nn.Module):
    """Layers each of which sees the channels of all before it."""

    depth: int
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for number in range(1, self.depth + 1):
            grown = _Layer(self.growth, name=f"denselayer{number}")(x, train)
            x = jnp.concatenate([x, grown], axis=-1)
        return x


class _Layer(nn.Module):
    """A 1x1 convolution to four times the channels that the 3x3 one adds."""

    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolve(nn.relu(batch_norm(x, train, "norm1")), 4 * self.growth, 1, "conv1")
        return convolve(nn.relu(batch_norm(x, train, "norm2")), self.growth, 3, "conv2")


class _Transition(nn.Module):
    """Half the channels, and half the pixels on a side."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolve(nn.relu(batch_norm(x, train, "norm")), x.shape[-1] // 2, 1, "conv")
        return avg_pool(x)
