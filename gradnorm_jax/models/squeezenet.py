"""SqueezeNet 1.1 as torchvision has it.

The last convolution comes before the pooling, so that the logits are no linear function of pooled
features: there is no head, and GradNorm is that of parameters by name (`classifier/1/kernel`).

References:
    Iandola et al. (2016), "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB
    model size". https://arxiv.org/abs/1602.07360
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import Layout
from gradnorm_jax.models.layers import convolve, max_pool
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.types import Outputs

CLASSIFIER = ("classifier", "1", "kernel")

layout: Layout = functools.partial(torch_layout, linear=None)
"""Where torchvision's files hold the parameter at a path."""

# Number of the layer: channels that squeeze, and of each half that expands. Pools are 2, 5 and 8.
_FIRES = {
    3: (16, 64),
    4: (16, 64),
    6: (32, 128),
    7: (32, 128),
    9: (48, 192),
    10: (48, 192),
    11: (64, 256),
    12: (64, 256),
}


class SqueezeNet(nn.Module):
    """The network; it has no batch statistics, and no features.

    Attributes:
        num_classes: C.
        dtype: of the activations up to the last convolution; pooling is in float32 at least.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """None in place of features, and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: normalised as in training.
            train: without effect, as there are no batch statistics. The dropout of training,
                before the last convolution, is left out.
        """
        x = _Trunk(name="features")(images.astype(self.dtype))
        x = _Classifier(self.num_classes, name="classifier")(to_float32_at_least(x))
        no_features: Any = None
        return Outputs(no_features, nn.relu(x).mean(axis=(1, 2)))


class _Trunk(nn.Module):
    """All but the last convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(convolve(x, 64, 3, "0", stride=2, padding=0, use_bias=True))
        for number in range(2, 13):
            if number in _FIRES:
                x = _Fire(*_FIRES[number], name=str(number))(x)
            else:
                # The last window may hang over the edge.
                x = max_pool(x, padding=(0, 1 - x.shape[1] % 2))
        return x


class _Fire(nn.Module):
    """A 1x1 convolution, then beside each other a 1x1 and a 3x3 one."""

    squeeze: int
    expand: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(convolve(x, self.squeeze, 1, "squeeze", use_bias=True))
        one = convolve(x, self.expand, 1, "expand1x1", use_bias=True)
        three = convolve(x, self.expand, 3, "expand3x3", use_bias=True)
        return nn.relu(jnp.concatenate([one, three], axis=-1))


class _Classifier(nn.Module):
    """The last convolution, whose outputs are the classes."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return convolve(x, self.num_classes, 1, "1", use_bias=True)
