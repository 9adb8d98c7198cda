"""Layers as PyTorch computes them, where Flax's own would differ; numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gradnorm_jax.models import densenet
from gradnorm_jax.models.checkpoint import CheckpointEntry, from_params, to_params
from gradnorm_jax.models.layers import avg_pool, batch_norm, convolve, max_pool
from gradnorm_jax.models.torch_layout import torch_layout
from gradnorm_jax.models.vit import timm_layout


class Layer(nn.Module):
    """One of the functions as a module."""

    function: object

    @nn.compact
    def __call__(self, *args):
        return self.function(*args)


def test_strided_convolution_pads_all_sides_alike():
    module = Layer(lambda x: convolve(x, 1, 3, "c", stride=2))
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    out = module.apply({"params": {"c": {"kernel": kernel}}}, jnp.ones((1, 4, 4, 1)))
    # The first window hangs over at the top and on the left, the last nowhere: SAME would have the
    # first inside, 36, and the last one out.
    np.testing.assert_array_equal(out[0, :, :, 0], [[24, 33], [27, 36]])


def test_batch_norm_by_running_statistics_and_by_those_of_the_batch():
    module = Layer(lambda x, train: batch_norm(x, train, "n"))
    x = jnp.asarray([1.0, 3.0]).reshape(2, 1, 1, 1)
    variables = {
        "params": {"n": {"scale": jnp.asarray([2.0]), "bias": jnp.asarray([5.0])}},
        "batch_stats": {"n": {"mean": jnp.asarray([1.0]), "var": jnp.asarray([4.0 - 1e-5])}},
    }
    np.testing.assert_allclose(module.apply(variables, x, False).ravel(), [5.0, 7.0], rtol=1e-6)
    out, updates = module.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(out.ravel(), [3.0, 7.0], rtol=1e-4)
    new = updates["batch_stats"]["n"]
    np.testing.assert_allclose((new["mean"], new["var"]), ([1.1], [3.7]), rtol=1e-5)


def test_batch_norm_is_computed_in_float32():
    module = Layer(lambda x: batch_norm(x, False, "n"))
    x = jnp.full((1, 1, 1, 1), 256.0, jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    # 257 is no bfloat16: subtracted from one, the difference would be lost.
    variables["batch_stats"]["n"]["mean"] = jnp.asarray([257.0])
    out = module.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == -1.0


def test_pooling():
    x = -jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    np.testing.assert_array_equal(max_pool(x).ravel(), [-1, -2, -4, -5])
    np.testing.assert_array_equal(avg_pool(x).ravel(), [-3])


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        (("a", "0", "kernel"), CheckpointEntry("a.0.weight", (2, 3, 1, 0))),
        (("fc", "kernel"), CheckpointEntry("fc.weight", (1, 0))),
        (("a", "bn", "mean"), CheckpointEntry("a.bn.running_mean")),
        (("a", "bn", "scale"), CheckpointEntry("a.bn.weight")),
        (("fc", "bias"), CheckpointEntry("fc.bias")),
    ],
)
def test_names_of_pytorch(path, entry):
    assert torch_layout(path, linear="fc") == entry


def test_older_names_of_densenet():
    old = {"features.denseblock1.denselayer2.norm.1.weight": 0, "features.norm0.weight": 1}
    new = {"features.denseblock1.denselayer2.norm1.weight": 0, "features.norm0.weight": 1}
    assert densenet.clean(old) == new


def test_a_joint_array_is_taken_apart_and_put_together():
    """Query, key and value of two heads, as timm keeps them: rows are outputs."""
    block = ("Transformer", "encoderblock_3", "MultiHeadDotProductAttention_1")
    width, names = 4, ("query", "key", "value")
    joint = np.arange(3.0 * width * width, dtype="f").reshape(3 * width, width)
    template = {name: {"kernel": jax.ShapeDtypeStruct((4, 2, 2), "float32")} for name in names}
    for key in reversed(block):
        template = {key: template}
    checkpoint = {"blocks.3.attn.qkv.weight": joint}
    params = to_params(checkpoint, template, lambda path: timm_layout(path, width))
    key = params["Transformer"]["encoderblock_3"][block[-1]]["key"]["kernel"]
    # Output 3 of the keys is entry 1 of head 1.
    np.testing.assert_array_equal(key[:, 1, 1], joint[4 + 3])
    again = from_params(params, lambda path: timm_layout(path, width))
    np.testing.assert_array_equal(again["blocks.3.attn.qkv.weight"], joint)
