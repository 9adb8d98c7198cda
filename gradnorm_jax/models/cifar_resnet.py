"""The ResNet of 32 x 32 images, with shortcuts that have no parameters.

Variables carry the names of the widely used PyTorch files: `layer1/0/conv1/kernel` is their
`layer1.0.conv1.weight`.

References:
    He et al. (2016), "Deep Residual Learning for Image Recognition", section 4.2, shortcuts of
    option A. https://arxiv.org/abs/1512.03385
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import CheckpointEntry
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.tree import Path
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("linear", "kernel"), bias=("linear", "bias"))

_NAMES = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}


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
        x = _convolve(images.astype(self.dtype), 16, "conv1")
        x = nn.relu(_normalize(x, train, "bn1"))
        for index in range(3):
            stride = 1 if index == 0 else 2
            x = _Layer(blocks, 16 * 2**index, stride, name=f"layer{index + 1}")(x, train)
        features = to_float32_at_least(x).mean(axis=(1, 2))
        head = nn.Dense(self.num_classes, dtype=features.dtype, name="linear")
        return Outputs(features, head(features))


def layout(path: Path) -> CheckpointEntry:
    """Where a PyTorch state dict holds the variable at `path`."""
    *scopes, name = map(str, path)
    key = ".".join([*scopes, _NAMES.get(name, name)])
    if name != "kernel":
        return CheckpointEntry(key)
    return CheckpointEntry(key, axes=(1, 0) if scopes == ["linear"] else (2, 3, 1, 0))


class _Layer(nn.Module):
    """A number of blocks, the first of which has the stride."""

    blocks: int
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index in range(self.blocks):
            stride = self.stride if index == 0 else 1
            x = _Block(self.channels, stride, name=str(index))(x, train)
        return x


class _Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is thinned and padded."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = _convolve(x, self.channels, "conv1", self.stride)
        y = nn.relu(_normalize(y, train, "bn1"))
        y = _normalize(_convolve(y, self.channels, "conv2"), train, "bn2")
        padding = (self.channels - x.shape[-1]) // 2
        shortcut = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (padding, padding))))


def _convolve(x: jax.Array, channels: int, name: str, stride: int = 1) -> jax.Array:
    return nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        dtype=x.dtype,
        name=name,
    )(x)


def _normalize(x: jax.Array, train: bool, name: str) -> jax.Array:
    wide = to_float32_at_least(x)
    normalize = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        # Widened already; Flax's own way fails on float64 where type promotion is strict.
        force_float32_reductions=False,
        param_dtype=wide.dtype,
        name=name,
    )
    return normalize(wide).astype(x.dtype)
