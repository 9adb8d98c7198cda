"""Small classifiers for tests of the evaluation, and data for them."""

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import from_apply
from gradnorm_jax.data.preprocess import get_preprocess

CLASSES = 3
SIZE = 6
PREPROCESS = get_preprocess(f"squash={SIZE},mean=half,std=half")


def apply(params, images):
    """Two layers on flattened inputs."""
    flat = images.reshape(len(images), -1).astype(jnp.float32)
    features = jnp.tanh(flat @ params["body"])
    return features @ params["head"]["kernel"] + params["head"]["bias"][None]


def make_params(inputs, features=16, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    return {
        "body": normal(inputs, features),
        "head": {"kernel": normal(features, CLASSES), "bias": normal(CLASSES)},
    }


def build(inputs=SIZE * SIZE * 3, **options):
    """A model of inputs with so many entries, by default of images as `PREPROCESS` makes them."""
    return from_apply(apply, make_params(inputs, **options), jnp.zeros((2, inputs), jnp.float32))


def build_wide():
    return build(features=24)


def counted(fn=apply):
    """A copy of a function and the list that each trace of it adds to."""
    traces = []

    def traced(params, images):
        traces.append(images.shape)
        return fn(params, images)

    return traced, traces


def images(count, seed=0, shape=(7, 6, 3)):
    """Random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def inputs(count, seed=0, shape=(SIZE * SIZE * 3,)):
    """Random floats, as the network takes them."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def labels(count):
    return np.arange(count) % CLASSES


def ragged(*columns, sizes=(3, 1, 0, 5)):
    """Batches of those sizes, over and over, of arrays of one length."""
    first = 0
    while first < len(columns[0]):
        for size in sizes:
            yield tuple(column[first : first + size] for column in columns)
            first += size


def as_device_count(count):
    """A mesh of that many devices."""
    from gradnorm_jax.sharding import batch_mesh

    return batch_mesh(jax.devices()[:count])
