"""Small networks, one for each family of architectures: losses, parameters and batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

from gradnorm_jax.losses import cross_entropy, kl_to_uniform
from gradnorm_jax.models import MODELS
from gradnorm_jax.models.bit import BiT
from gradnorm_jax.models.mobilenet_v2 import MobileNetV2

CLASSES = 5


class Network(NamedTuple):
    """A loss `(params, batch) -> [B]`, and what to call it with."""

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def draw(params, dtype, seed=0):
    """Random values of a size at which neither activations nor gradients die out."""
    leaves, treedef = jax.tree.flatten(params)
    generator = np.random.default_rng(seed)

    def values(leaf):
        noise = generator.normal(size=leaf.shape)
        if leaf.ndim < 2:
            return jnp.asarray(1 + noise / 4, dtype)
        return jnp.asarray(noise * np.sqrt(leaf.shape[-1] / leaf.size), dtype)

    return jax.tree.unflatten(treedef, [values(leaf) for leaf in leaves])


def draw_shapes(shapes, dtype):
    """`draw` for a tree of shapes."""
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return draw(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=is_shape), dtype
    )


def images(dtype, size=12, batch=3, channels=3):
    shape = (batch, size, size, channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def tokens(batch=3, length=6, vocabulary=11):
    return jnp.asarray(np.random.default_rng(2).integers(0, vocabulary, (batch, length)))


def from_linen(module, batch, dtype, logits=lambda outputs: outputs):
    params = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]

    def loss_fn(params, batch):
        return kl_to_uniform(logits(module.apply({"params": params}, batch)))

    return Network(loss_fn, draw(params, dtype), batch)


def bit(dtype):
    module = BiT(CLASSES, depths=(1, 1), width=8, groups=4, dtype=dtype)
    return from_linen(module, images(dtype, 20), dtype, lambda outputs: outputs.logits)


def bit_in_bfloat16(dtype):
    module = BiT(CLASSES, depths=(1, 1), width=8, groups=4, dtype=jnp.bfloat16)
    return from_linen(module, images(dtype, 20), dtype, lambda outputs: outputs.logits)


def mobilenet(dtype):
    module = MobileNetV2(CLASSES, dtype=dtype)
    return from_linen(module, images(dtype, 24, batch=2), dtype, lambda outputs: outputs.logits)


class DenseBlock(nn.Module):
    """DenseNet style: every layer sees all earlier ones, with folded batch statistics."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": self.param_dtype, "dtype": self.param_dtype}
        for _ in range(3):
            y = nn.relu(nn.GroupNorm(1, use_fast_variance=False, **options)(x))
            y = nn.Conv(8, (1, 1), use_bias=False, **options)(y)
            y = nn.Conv(4, (3, 3), feature_group_count=2, **options)(nn.relu(y))
            x = jnp.concatenate([x, y], axis=-1)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES, **options)(x.mean(axis=(1, 2)))


def densenet(dtype):
    return from_linen(DenseBlock(dtype), images(dtype, 8), dtype)


class Transformer(nn.Module):
    """ViT style: patches, a class token, one position embedding for all, attention, LayerNorm."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": self.param_dtype, "dtype": self.param_dtype}
        x = nn.Conv(16, (4, 4), (4, 4), **options)(x).reshape(x.shape[0], -1, 16)
        token = self.param("token", nn.initializers.normal(), (1, 1, 16), self.param_dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 16)), x], axis=1)
        shape = (1, *x.shape[1:])
        x = x + self.param("positions", nn.initializers.normal(), shape, self.param_dtype)
        for _ in range(2):
            y = nn.LayerNorm(use_fast_variance=False, **options)(x)
            x = x + nn.MultiHeadDotProductAttention(2, **options)(y)
            y = nn.LayerNorm(use_fast_variance=False, **options)(x)
            x = x + nn.Dense(16, **options)(nn.gelu(nn.Dense(32, **options)(y)))
        return nn.Dense(CLASSES, **options)(x[:, 0])


def vit(dtype):
    return from_linen(Transformer(dtype), images(dtype, 12), dtype)


def embedding_tied_with_output(dtype):
    """One table looks up the tokens and, transposed, makes the logits."""

    def loss_fn(params, batch):
        table = params["table"]
        x = jnp.tanh(table[batch["tokens"]] @ params["kernel"]) + params["bias"][None, None]
        return cross_entropy(x.mean(axis=1) @ table.T, jax.nn.one_hot(batch["target"], 11))

    shapes = {"table": (11, 7), "kernel": (7, 7), "bias": (7,)}
    params = draw_shapes(shapes, dtype)
    return Network(loss_fn, params, {"tokens": tokens(), "target": tokens()[:, 0]})


class Recurrent(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": self.param_dtype, "dtype": self.param_dtype}
        x = nn.RNN(nn.LSTMCell(6, **options))(x)
        return nn.Dense(CLASSES, **options)(x[:, -1])


def lstm(dtype):
    batch = images(dtype, 5)[:, 0]
    return from_linen(Recurrent(dtype), batch, dtype)


def scanned_convolutions(dtype):
    """A stack of convolutional layers held in one leaf, applied by a loop and by branches."""

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss_fn(params, batch):
        x, _ = lax.scan(lambda x, k: (jnp.tanh(convolve(x, k)), None), batch, params["stack"])
        is_large = x.sum() > 0
        x = lax.cond(
            is_large, lambda x: convolve(x, params["then"]), lambda x: x * params["else"], x
        )
        return kl_to_uniform(x.mean(axis=(1, 2)))

    shapes = {"stack": (3, 3, 3, 3, 3), "then": (3, 3, 3, 3), "else": ()}
    params = draw_shapes(shapes, dtype)
    return Network(loss_fn, params, images(dtype, 8, batch=4))


class Block(nn.Module):
    """Of a transformer, as `nn.scan` takes it."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x, _):
        options = {"param_dtype": self.param_dtype, "dtype": self.param_dtype}
        y = nn.LayerNorm(use_fast_variance=False, **options)(x)
        x = x + nn.MultiHeadDotProductAttention(2, **options)(y)
        y = nn.LayerNorm(use_fast_variance=False, **options)(x)
        return x + nn.Dense(8, **options)(nn.gelu(nn.Dense(12, **options)(y))), None


class ScannedTransformer(nn.Module):
    """The blocks' parameters are held in one leaf each, and activations are computed again."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": self.param_dtype, "dtype": self.param_dtype}
        x = nn.Conv(8, (4, 4), (4, 4), **options)(x).reshape(x.shape[0], -1, 8)
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(self.param_dtype)(x, None)
        return nn.Dense(CLASSES, **options)(x.mean(axis=1))


def scanned_transformer(dtype):
    return from_linen(ScannedTransformer(dtype), images(dtype, 12), dtype)


class Rematerialized(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": self.param_dtype, "dtype": self.param_dtype}
        for _ in range(2):
            x = nn.remat(nn.Conv)(6, (3, 3), **options)(x)
            x = nn.relu(nn.remat(nn.GroupNorm)(2, use_fast_variance=False, **options)(x))
        return nn.Dense(CLASSES, **options)(x.mean(axis=(1, 2)))


def remat(dtype):
    return from_linen(Rematerialized(dtype), images(dtype, 8), dtype)


def nnx_module(dtype):
    class Classifier(nnx.Module):
        def __init__(self, rngs):
            options = {"param_dtype": dtype, "dtype": dtype, "rngs": rngs}
            self.conv = nnx.Conv(3, 6, (3, 3), strides=2, **options)
            self.norm = nnx.BatchNorm(6, use_running_average=True, **options)
            self.head = nnx.Linear(6, CLASSES, **options)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2)))

    graph, params, rest = nnx.split(Classifier(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, batch):
        return kl_to_uniform(nnx.merge(graph, params, rest)(batch))

    return Network(loss_fn, draw(params, dtype), images(dtype, 8))


def odd_convolutions(dtype):
    """Every option of a convolution, kernels made of parameters, a penalty, a low-rank kernel."""
    options = [
        {"window_strides": (2, 1), "padding": [(2, 0), (1, 3)], "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": [(-1, 2), (1, 1)], "lhs_dilation": (2, 3)},
        {"window_strides": (1, 2), "padding": [(1, 1), (0, 1)], "feature_group_count": 2},
        {"window_strides": (1, 1), "padding": [(0, 0), (1, 0)], "feature_group_count": 4},
    ]

    def loss_fn(params, batch):
        x = batch.transpose(3, 0, 1, 2)  # CNHW in, a kernel OIHW made of one HWIO, NHWC out
        for index, option in enumerate(options):
            kernel = jnp.tanh(params[f"conv{index}"]).transpose(3, 2, 0, 1)
            x = lax.conv_general_dilated(
                x, kernel, dimension_numbers=("CNHW", "OIHW", "NHWC"), **option
            )
            x = jnp.sin(x).transpose(3, 0, 1, 2)
        x = x.reshape(x.shape[0], batch.shape[0], -1).sum(axis=2).T
        x = x @ (params["left"] @ params["right"]) / (1 + params["scale"] ** 2)
        return kl_to_uniform(x) + (params["conv0"] ** 2).sum() + 0 * params["unused"].sum()

    shapes = {
        "conv0": (3, 2, 3, 4),
        "conv1": (2, 2, 4, 4),
        "conv2": (3, 3, 2, 4),
        "conv3": (2, 2, 1, 8),
        "left": (8, 2),
        "right": (2, CLASSES),
        "scale": (),
        "unused": (3,),
    }
    params = draw_shapes(shapes, dtype)
    return Network(loss_fn, params, images(dtype, 7))


def few_rows(dtype):
    """A wide layer on four tokens, and one on four positions."""

    def loss_fn(params, batch):
        hidden = jnp.tanh(batch.reshape(-1, 4, 48) @ params["dense"]).reshape(-1, 2, 2, 40)
        hidden = lax.conv_general_dilated(
            hidden, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return kl_to_uniform(jnp.tanh(hidden).sum(axis=(1, 2))[:, :CLASSES])

    params = draw_shapes({"conv": (2, 2, 40, 30), "dense": (48, 40)}, dtype)
    return Network(loss_fn, params, images(dtype, 8))


ALL = (
    bit,
    mobilenet,
    densenet,
    vit,
    embedding_tied_with_output,
    lstm,
    scanned_convolutions,
    scanned_transformer,
    remat,
    nnx_module,
    odd_convolutions,
)


TABLE = {
    # network: side of its images, what it has fewer of
    "resnet18": (24, {"depths": (1, 1)}),
    "resnet50": (24, {"depths": (1, 1)}),
    "wide_resnet50_2": (24, {"depths": (1, 1)}),
    "resnet18_cifar": (8, {"depths": (1, 1)}),
    "resnet20_cifar": (8, {"depth": 8}),
    "densenet121": (32, {"depths": (2, 1), "growth": 4}),
    "densenet101_cifar": (8, {"depth": 10, "growth": 4}),
    "wide_resnet40_2_cifar": (8, {"depth": 10, "widen": 1}),
    "vit_ti16": (16, {"depth": 1, "width": 16, "heads": 2, "patch": 8}),
    "mobilenet_v2_torch": (24, {}),
    "squeezenet1_1": (32, {}),
}


def of_table(name, dtype):
    """A network known by name, of which the batch statistics are no parameters."""
    side, options = TABLE[name]
    module = MODELS[name].build(CLASSES, dtype=dtype, **options)
    batch = images(dtype, side, batch=2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch)
    params = draw(shapes["params"], dtype)
    state = {
        key: jax.tree.map(jnp.abs, draw(shapes[key], dtype)) for key in shapes.keys() - {"params"}
    }

    def loss_fn(state, params, batch):
        return kl_to_uniform(module.apply({"params": params, **state}, batch).logits)

    return Network(jax.tree_util.Partial(loss_fn, state), params, batch)
