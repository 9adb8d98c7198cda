"""NNX classifiers as the public writes them, with configurations that cannot be hashed."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass
class Config:
    """A configuration that is not frozen, and so has no hash."""

    widths: list[int] = dataclasses.field(default_factory=lambda: [4, 8])
    padding: list[tuple[int, int]] = dataclasses.field(default_factory=lambda: [(1, 1), (1, 1)])
    heads: int = 2
    classes: int = 5


class MnistCNN(nnx.Module):
    """The shape of flax's own example for MNIST."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(32, 16, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.dropout1(self.batch_norm1(self.conv1(x)), rngs=rngs)
        x = self.avg_pool(nnx.relu(x))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1)), rngs=rngs))
        return self.linear2(x)


class Block(nnx.Module):
    def __init__(self, config, inputs, outputs, *, rngs):
        self.config = config
        self.conv = nnx.Conv(inputs, outputs, (3, 3), padding=config.padding, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)
        self.project = nnx.Conv(inputs, outputs, (1, 1), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.project(x) + self.norm(self.conv(x)))


class ResNet(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        sizes = [3, *config.widths]
        self.blocks = nnx.List(
            [Block(config, *pair, rngs=rngs) for pair in itertools.pairwise(sizes)]
        )
        self.fc = nnx.Linear(sizes[-1], config.classes, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(axis=(1, 2)))


class DenseNet(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        inputs, layers = 3, []
        for width in config.widths:
            layers.append(nnx.Conv(inputs, width, (3, 3), padding=config.padding, rngs=rngs))
            inputs += width
        self.layers = nnx.List(layers)
        self.norm = nnx.BatchNorm(inputs, rngs=rngs)
        self.classifier = nnx.Conv(inputs, config.classes, (1, 1), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.concatenate([x, nnx.relu(layer(x))], axis=-1)
        x = nnx.relu(self.norm(x)).mean(axis=(1, 2), keepdims=True)
        return self.classifier(x).squeeze((1, 2))


class ViT(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        width = config.widths[-1]
        self.embed = nnx.Conv(3, width, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.heads, width, decode=False, rngs=rngs)
        self.head = nnx.Linear(width, config.classes, rngs=rngs)

    def __call__(self, images):
        x = self.embed(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)
        x = x + self.attention(self.norm(x))
        return self.head(x[:, 0])


class ConvNeXt(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        width = config.widths[-1]
        self.stem = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.depthwise = nnx.Conv(width, width, (7, 7), feature_group_count=width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)
        self.scale = nnx.Param(jnp.full((width,), 1e-2))
        self.head = nnx.Linear(width, config.classes, rngs=rngs)

    def __call__(self, images):
        x = self.stem(images)
        y = self.contract(nnx.gelu(self.expand(self.norm(self.depthwise(x)))))
        x = x + y * jnp.broadcast_to(self.scale[...], y.shape)
        return self.head(self.norm(x.mean(axis=(1, 2))))


class Adapted(nnx.Module):
    """A network whose head has been wrapped for low-rank adaptation."""

    def __init__(self, *, rngs):
        self.body = nnx.Linear(192, 8, rngs=rngs)
        self.head = nnx.LoRALinear(8, 5, lora_rank=2, rngs=rngs)
        lora_b = self.head.lora.lora_b
        lora_b[...] = jax.random.normal(jax.random.key(1), lora_b.shape)

    def __call__(self, images):
        return self.head(nnx.relu(self.body(images.reshape(len(images), -1))))


def sequential(*, rngs):
    return nnx.Sequential(
        lambda x: x.reshape(len(x), -1),
        nnx.Linear(192, 8, rngs=rngs),
        nnx.relu,
        nnx.Linear(8, 5, rngs=rngs),
    )
