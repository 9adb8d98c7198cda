"""Linen classifiers as the public writes them: with lists, dicts, partials and configurations."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

ModuleDef = Any


class Config:
    """Attributes by name that can be changed, compared but not hashed, as ConfigDict is."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __eq__(self, other):
        return isinstance(other, Config) and vars(self) == vars(other)

    __hash__ = None


def config(**fields):
    """A real ConfigDict where there is one."""
    try:
        from ml_collections import ConfigDict
    except ImportError:
        return Config(**fields)
    return ConfigDict(fields)


class BottleneckBlock(nn.Module):
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (1, 1))(y))
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ImageNetResNet(nn.Module):
    """The shape of flax's examples/imagenet: layers are made by partials, blocks are a class."""

    stage_sizes: Sequence[int]
    block_cls: ModuleDef
    num_classes: int
    num_filters: int = 4
    dtype: Any = jnp.float32
    act: Callable = nn.relu
    conv: ModuleDef = nn.Conv

    @nn.compact
    def __call__(self, x, train=True):
        conv = functools.partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        x = conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), strides=(2, 2), padding="SAME")
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                x = self.block_cls(
                    self.num_filters * 2**i,
                    strides=(2, 2) if i > 0 and j == 0 else (1, 1),
                    conv=conv,
                    norm=norm,
                    act=self.act,
                )(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))
        return jnp.asarray(x, self.dtype)


class ViT(nn.Module):
    """The shape of vit_jax: a class token, and the transformer's options in a ConfigDict."""

    num_classes: int
    patches: Any
    transformer: Any
    hidden_size: int = 8

    @nn.compact
    def __call__(self, images, *, train):
        size = self.patches.size
        x = nn.Conv(self.hidden_size, size, strides=size, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, self.hidden_size)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
        x = jnp.concatenate([jnp.tile(token, [len(x), 1, 1]), x], axis=1)
        for _ in range(self.transformer.num_layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(
                num_heads=self.transformer.num_heads, deterministic=not train
            )(y, y)
            y = nn.Dense(self.transformer.mlp_dim)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.hidden_size)(nn.gelu(y))
        x = nn.LayerNorm(name="encoder_norm")(x)[:, 0]
        return nn.Dense(self.num_classes, name="head")(x)


class WithDictionary(nn.Module):
    widths: dict[str, int]
    heads: list[str]

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for name, width in self.widths.items():
            x = nn.relu(nn.Dense(width, name=name)(x))
        return nn.Dense(5, name=self.heads[0])(x)


class BigVision(nn.Module):
    """The shape of big_vision: logits, and a dictionary of everything on the way to them."""

    num_classes: int = 5
    rep_size: int = 6

    @nn.compact
    def __call__(self, images, *, train=False):
        out = {}
        x = out["stem"] = nn.Conv(8, (4, 4), strides=4, padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, 8)
        out["encoder"] = {"block00": {"+mlp": x}}
        hidden = nn.Dense(self.rep_size, name="pre_logits")
        head = nn.Dense(self.num_classes, name="head")
        out["pre_logits_2d"] = nn.tanh(hidden(out["stem"]))
        out["head_input"] = x = x.mean(axis=1)
        x = out["pre_logits"] = nn.tanh(hidden(x))
        out["logits_2d"] = head(out["pre_logits_2d"])
        x = out["logits"] = head(x)
        return x, out


class TiedEmbedding(nn.Module):
    """The class embeddings that label smoothing learns are the last layer too."""

    @nn.compact
    def __call__(self, images):
        labels = nn.Embed(5, 8, name="labels")
        x = nn.relu(nn.Dense(8)(images.reshape(len(images), -1)))
        return labels.attend(x + labels(jnp.zeros(1, jnp.int32)))


class RawHead(nn.Module):
    """A head of plain parameters: by a matrix product, or by einsum over two axes."""

    einsum: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(8)(images.reshape(len(images), -1)))
        bias = self.param("b", nn.initializers.normal(), (5,))
        if self.einsum:
            w = self.param("w", nn.initializers.lecun_normal(), (5, 2, 4))
            return jnp.einsum("bhd,chd->bc", x.reshape(-1, 2, 4), w) + bias[None]
        return x @ self.param("w", nn.initializers.lecun_normal(), (8, 5)) + bias[None]


class HeadTwice(nn.Module):
    """As in bit_paper: the head is applied to all positions first, and then to their mean."""

    @nn.compact
    def __call__(self, images):
        head = nn.Conv(5, (1, 1), name="head")
        x = nn.relu(nn.Conv(8, (3, 3), strides=4)(images))
        return {
            "logits_2d": head(x),
            "logits": head(x.mean(axis=(1, 2), keepdims=True))[:, 0, 0],
        }


@dataclasses.dataclass
class Result:
    """What a network returns; no pytree."""

    logits: Any
    features: Any


class ReturnsDataclass(nn.Module):
    @nn.compact
    def __call__(self, images):
        features = nn.Dense(8)(images.reshape(len(images), -1))
        return Result(nn.Dense(5, name="head")(features), features)


class ConvolutionBeforePooling(nn.Module):
    """The shape of SqueezeNet: classes are convolved, then averaged over positions."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(images))
        x = jnp.concatenate([nn.relu(nn.Conv(3, (1, 1))(x)), nn.relu(nn.Conv(3, (3, 3))(x))], -1)
        return nn.relu(nn.Conv(5, (1, 1), name="classes")(x)).mean(axis=(1, 2))
