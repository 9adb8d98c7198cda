"""BiT: the pre-activation ResNet with group normalisation and weight standardisation.

The parameter tree carries the names of the published .npz files without their leading `resnet/`:
`root_block/standardized_conv2d/kernel`, `block1/unit01/a/group_norm/scale`, `head/conv2d/bias`.

References:
    Kolesnikov et al. (2020), "Big Transfer (BiT): General Visual Representation Learning".
    https://arxiv.org/abs/1912.11370
    Qiao et al. (2019), "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization". https://arxiv.org/abs/1903.10520
    Wu, He (2018), "Group Normalization". https://arxiv.org/abs/1803.08494
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import CheckpointEntry
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.tree import Path
from gradnorm_jax.types import Head, Outputs
from gradnorm_jax.weights.stored import Checkpoint

HEAD = Head(kernel=("head", "conv2d", "kernel"), bias=("head", "conv2d", "bias"))

_EXPANSION = 4
_GROUP_NORM_NAMES = {"scale": "gamma", "bias": "beta"}


class BiT(nn.Module):
    """The network; D = 32 * `width` features with the four blocks of the paper.

    It has no batch statistics and no randomness, so it is the same function in training and in
    evaluation.

    Attributes:
        num_classes: C.
        depths: units in each of the four blocks, (3, 4, 6, 3) for R50.
        width: channels of the stem; 64 times the multiplier of the published names (x1, x2, ...).
        groups: of the group normalisation; divides `width`.
        dtype: of the activations up to the last normalisation. Statistics, standardised weights
            and everything from the last normalisation on are in float32 at least.
    """

    num_classes: int
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, H, W, 3]`."""
        x = _Convolution(self.width, kernel_size=7, stride=2, name="root_block")(
            images.astype(self.dtype)
        )
        # Nothing rectifies the stem: the border of zeros takes part in the maximum, unlike the
        # minus infinity that max_pool would pad with.
        x = nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), strides=(2, 2))
        for index, depth in enumerate(self.depths):
            x = _Block(
                depth,
                channels=self.width * 2**index,
                stride=1 if index == 0 else 2,
                groups=self.groups,
                name=f"block{index + 1}",
            )(x)
        features = _normalize_and_rectify(to_float32_at_least(x), self.groups).mean(axis=(1, 2))
        return Outputs(features, _Head(self.num_classes, name="head")(features))


def standardize(kernel: jax.Array) -> jax.Array:
    """`kernel` `[h, w, in, out]` shifted and scaled, each output's weights to mean 0, variance 1.

    The variance is the biased one, and 1e-10 is added to it under the root.
    """
    # As a matrix: reductions over three axes at once are slow on CPUs.
    weights = to_float32_at_least(kernel).reshape(-1, kernel.shape[-1])
    centred = weights - weights.mean(axis=0, keepdims=True)
    variance = jnp.square(centred).mean(axis=0, keepdims=True)
    return (centred / jnp.sqrt(variance + 1e-10)).reshape(kernel.shape)


def layout(path: Path) -> CheckpointEntry:
    """Where the published .npz files hold the parameter at `path`."""
    *scopes, name = map(str, path)
    if scopes[-1] == "group_norm":
        name = _GROUP_NORM_NAMES[name]
    return CheckpointEntry("/".join(["resnet", *scopes, name]))


def remove_numbers(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` without the serial numbers that some files carry (`standardized_conv2d_17/`).

    Raises:
        ValueError: two keys differ in nothing else.
    """
    cleaned: Checkpoint = {}
    for key, array in checkpoint.items():
        name = re.sub(r"/(standardized_conv2d|group_norm|conv2d)_\d+/", r"/\1/", key)
        if name in cleaned:
            raise ValueError(
                f"the checkpoint holds {name!r} under two numbers; keep the one that belongs to it"
            )
        cleaned[name] = array
    return cleaned


def _normalize_and_rectify(x: jax.Array, groups: int) -> jax.Array:
    wide = to_float32_at_least(x)
    normalize = nn.GroupNorm(
        groups,
        epsilon=1e-5,
        # In two passes: the difference of E[x^2] and E[x]^2 loses digits.
        use_fast_variance=False,
        # Widened already; Flax's own way fails on float64 where type promotion is strict.
        force_float32_reductions=False,
        param_dtype=wide.dtype,
        name="group_norm",
    )
    return nn.relu(normalize(wide)).astype(x.dtype)


class _StandardizedConv(nn.Module):
    """Convolution without bias with standardised weights, padded by zeros on all sides alike."""

    channels: int
    kernel_size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        padding = self.kernel_size // 2
        return jax.lax.conv_general_dilated(
            x,
            standardize(kernel).astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class _Convolution(nn.Module):
    """A standardised convolution in a scope of its own: the root block, a projection."""

    channels: int
    kernel_size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _StandardizedConv(
            self.channels, self.kernel_size, self.stride, name="standardized_conv2d"
        )(x)


class _FirstLayer(nn.Module):
    """Layer a of a unit: `x -> (convolved, shortcut)`, where the shortcut has the unit's shape."""

    channels: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        activated = _normalize_and_rectify(x, self.groups)
        shortcut = x
        if self.stride > 1 or x.shape[-1] != _EXPANSION * self.channels:
            project = _Convolution(_EXPANSION * self.channels, stride=self.stride, name="proj")
            shortcut = project(activated)
        return _StandardizedConv(self.channels, name="standardized_conv2d")(activated), shortcut


class _Layer(nn.Module):
    """Layers b and c of a unit: group norm, ReLU, convolution."""

    channels: int
    groups: int
    kernel_size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _StandardizedConv(
            self.channels, self.kernel_size, self.stride, name="standardized_conv2d"
        )(_normalize_and_rectify(x, self.groups))


class _Unit(nn.Module):
    """Bottleneck of `channels` that widens to four times as many; its 3x3 has the stride."""

    channels: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, shortcut = _FirstLayer(self.channels, self.stride, self.groups, name="a")(x)
        x = _Layer(self.channels, self.groups, kernel_size=3, stride=self.stride, name="b")(x)
        x = _Layer(_EXPANSION * self.channels, self.groups, name="c")(x)
        return x + shortcut


class _Block(nn.Module):
    """A number of units, the first of which has the stride."""

    depth: int
    channels: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.depth):
            stride = self.stride if index == 0 else 1
            x = _Unit(self.channels, stride, self.groups, name=f"unit{index + 1:02d}")(x)
        return x


class _Head(nn.Module):
    """`[B, D] -> [B, C]`, the 1x1 convolution that the published files hold."""

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        convolve = nn.Conv(self.num_classes, (1, 1), dtype=features.dtype, name="conv2d")
        return convolve(features[:, None, None, :])[:, 0, 0, :]
