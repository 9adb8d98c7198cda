"""Layers that the networks share, as PyTorch computes them."""

from collections.abc import Callable

import jax
from flax import linen as nn

from gradnorm_jax.numerics import to_float32_at_least


def convolve(
    x: jax.Array,
    channels: int,
    size: int,
    name: str,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    use_bias: bool = False,
) -> jax.Array:
    """A convolution of `[B, H, W, C]` by squares of `size`, in the type of `x`.

    `padding` zeros are put on all four sides alike, by default half the size, whatever the stride:
    SAME would put more of them below and to the right.
    """
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=size // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=nn.initializers.he_normal(),
        dtype=x.dtype,
        name=name,
    )(x)


def batch_norm(x: jax.Array, train: bool, name: str) -> jax.Array:
    """Batch normalisation, computed in float32 at least.

    In training, by the statistics of the batch, which the collection `batch_stats` follows;
    otherwise by that collection.
    """
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


def layer_norm(x: jax.Array, name: str, epsilon: float = 1e-6) -> jax.Array:
    """Layer normalisation, computed in float32 at least."""
    wide = to_float32_at_least(x)
    normalize = nn.LayerNorm(
        epsilon=epsilon,
        # In two passes: the difference of E[x^2] and E[x]^2 loses digits.
        use_fast_variance=False,
        force_float32_reductions=False,
        param_dtype=wide.dtype,
        name=name,
    )
    return normalize(wide).astype(x.dtype)


def max_pool(x: jax.Array, padding: int | tuple[int, int] = 1) -> jax.Array:
    """The maximum of 3x3 pixels at every other one; what pads is never the maximum."""
    before, after = (padding, padding) if isinstance(padding, int) else padding
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=[(before, after)] * 2)


def avg_pool(x: jax.Array) -> jax.Array:
    """The mean of 2x2 pixels; an odd last row or column is left out."""
    # Flax's own divides by integers, which strict type promotion refuses.
    return nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4


def linear(features: jax.Array, num_classes: int, name: str) -> jax.Array:
    """The last layer, in the type of the features."""
    return nn.Dense(num_classes, dtype=features.dtype, name=name)(features)


class Stage(nn.Module):
    """Blocks named 0, 1, ..., of which the first has the stride.

    Attributes:
        block: makes one, `(stride=, name=) -> module`, whose call takes `(x, train)`.
        depth: how many.
        stride: of the first.
    """

    block: Callable[..., nn.Module]
    depth: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The last block's output."""
        for index in range(self.depth):
            stride = self.stride if index == 0 else 1
            x = self.block(stride=stride, name=str(index))(x, train)
        return x
