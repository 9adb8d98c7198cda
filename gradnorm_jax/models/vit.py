"""The Vision Transformer, classified by its class token.

Variables carry the names of the official `.npz` files:
`Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel`. Files in timm's layout are read as well.

References:
    Dosovitskiy et al. (2021), "An Image is Worth 16x16 Words: Transformers for Image Recognition at
    Scale". https://arxiv.org/abs/2010.11929
    Steiner et al. (2022), "How to train your ViT? Data, Augmentation, and Regularization in Vision
    Transformers", for S/16 and Ti/16. https://arxiv.org/abs/2106.10270
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.models.checkpoint import CheckpointEntry
from gradnorm_jax.models.layers import layer_norm, linear
from gradnorm_jax.numerics import to_float32_at_least
from gradnorm_jax.tree import Path, show_path
from gradnorm_jax.types import Head, Outputs

HEAD = Head(kernel=("head", "kernel"), bias=("head", "bias"))

_QKV = ("query", "key", "value")
_TIMM = {
    "cls": "cls_token",
    "embedding": "patch_embed.proj",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm": "norm",
    "head": "head",
    "LayerNorm_0": "norm1",
    "MultiHeadDotProductAttention_1/out": "attn.proj",
    "LayerNorm_2": "norm2",
    "MlpBlock_3/Dense_0": "mlp.fc1",
    "MlpBlock_3/Dense_1": "mlp.fc2",
}


class ViT(nn.Module):
    """The network; its features are the class token after the last normalisation.

    Attributes:
        num_classes: C.
        depth: encoder blocks.
        width: D, channels of a token.
        heads: of the attention; divides `width`.
        patch: side of the squares that images are cut into, in pixels.
        dtype: of the activations up to the last normalisation; normalisations, the softmax of the
            attention and the head are in float32 at least.
    """

    num_classes: int
    depth: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, H, W, 3]`.

        Args:
            images: in [-1, 1], all of one size: each patch has a position of its own.
            train: without effect, as there are no batch statistics; dropout is left out.
        """
        x = _embed(images.astype(self.dtype), self.width, self.patch)
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x = _Encoder(self.depth, self.heads, name="Transformer")(x)
        return Outputs(x, linear(x, self.num_classes, "head"))


def layout(path: Path) -> CheckpointEntry:
    """Where the official `.npz` files hold the parameter at `path`."""
    return CheckpointEntry(show_path(path))


def timm_layout(path: Path, width: int) -> CheckpointEntry:
    """Where timm's files hold the parameter at `path` in a network of that width."""
    if show_path(path) in _TIMM:
        return CheckpointEntry(_TIMM[show_path(path)])
    *scopes, leaf = map(str, path)
    block = ""
    if scopes[1:] and scopes[1].startswith("encoderblock_"):
        block, scopes = f"blocks.{scopes[1].removeprefix('encoderblock_')}.", scopes[2:]
    suffix = "bias" if leaf == "bias" else "weight"
    # A matrix of the attention is square there; here one of its axes is split into heads.
    square: dict[str, Any] = {"shape": (width,)}
    if leaf == "kernel":
        square = {"axes": (1, 0), "shape": (width, width)}
    if scopes[-1] in _QKV:
        part = (_QKV.index(scopes[-1]), len(_QKV))
        return CheckpointEntry(f"{block}attn.qkv.{suffix}", part=part, **square)
    key = f"{block}{_TIMM['/'.join(scopes)]}.{suffix}"
    if scopes[-1] == "out":
        return CheckpointEntry(key, **square)
    if leaf != "kernel":
        return CheckpointEntry(key)
    return CheckpointEntry(key, axes=(2, 3, 1, 0) if scopes == ["embedding"] else (1, 0))


def _embed(images: jax.Array, width: int, patch: int) -> jax.Array:
    """Tokens `[B, N, D]` of images, one for each patch."""
    squares = (patch, patch)
    embed = nn.Conv(
        width, squares, strides=squares, padding="VALID", dtype=images.dtype, name="embedding"
    )
    return embed(images).reshape(len(images), -1, width)


class _Encoder(nn.Module):
    """Positions, the blocks, and the class token of their output, normalised."""

    depth: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _Positions(name="posembed_input")(x)
        for index in range(self.depth):
            x = _Block(self.heads, name=f"encoderblock_{index}")(x)
        return layer_norm(to_float32_at_least(x[:, 0]), "encoder_norm")


class _Positions(nn.Module):
    """Adds to each token what is learned of its position."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, *x.shape[1:])
        return x + self.param("pos_embedding", nn.initializers.normal(0.02), shape).astype(x.dtype)


class _Block(nn.Module):
    """Attention and a perceptron, each of the normalised input and added to it."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attend = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=x.dtype,
            attention_fn=_attend,
            name="MultiHeadDotProductAttention_1",
        )
        x = x + attend(layer_norm(x, "LayerNorm_0"))
        return x + _Perceptron(name="MlpBlock_3")(layer_norm(x, "LayerNorm_2"))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
    """Attention `[B, N, heads, D / heads]`, its softmax in float32 at least.

    What else Flax gives is about masks and dropout, of which there are none.
    """
    query = query / math.sqrt(query.shape[-1])
    scores = to_float32_at_least(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores).astype(value.dtype), value)


class _Perceptron(nn.Module):
    """Four times the channels, and back."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.Dense(4 * width, dtype=x.dtype, name="Dense_0")(x)
        return nn.Dense(width, dtype=x.dtype, name="Dense_1")(nn.gelu(x, approximate=False))
