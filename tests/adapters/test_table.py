"""Classifiers that nobody here wrote, or of the same shape: each is taken as it is."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from gradnorm_jax.adapters.apply import from_apply
from gradnorm_jax.adapters.linen import from_linen
from gradnorm_jax.adapters.nnx import from_nnx
from gradnorm_jax.types import Model, head_parameters
from tests.adapters import zoo_linen, zoo_nnx

KEYS = jax.random.split(jax.random.key(0), 3)
IMAGES = jax.random.normal(KEYS[0], (4, 8, 8, 3))


@pytest.fixture(autouse=True)
def as_jax_comes():
    """Other people's models need the promotions that are off in our own tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Entry(NamedTuple):
    """A row of the table.

    Attributes:
        build: makes the model, anew each time.
        own: `(variables, images) -> logits`, without us.
        variables: for `own`.
        kernel: where the last layer's kernel should be found.
        images: to try it on.
    """

    build: Callable[[], Model]
    own: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    kernel: str
    images: jax.Array = IMAGES


def filled(shapes):
    """Arrays of these shapes, as after training: nothing is zero, and variances are positive."""

    def fill(path, leaf):
        values = np.cos(np.arange(leaf.size, dtype=np.float64) * 0.7).reshape(leaf.shape)
        is_param = path[0] == jax.tree_util.DictKey("params")
        return (0.3 * values + 0.02 if is_param else 0.6 + 0.4 * values).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def linen(make, kernel, *, images=IMAGES, logits=lambda output: output, **kwargs):
    """A Linen module that is made anew for each model."""
    init = functools.partial(make().init, **kwargs)
    variables = filled(jax.eval_shape(init, KEYS[1], images))

    def own(variables, images):
        return logits(make().apply(variables, images, **kwargs))

    def build():
        return from_linen(make(), variables, images, **kwargs)

    return Entry(build, own, variables, kernel, images)


def nnx_entry(make, kernel, *, images=IMAGES):
    """An NNX module that is made anew for each model."""
    evaluated = make()
    evaluated.eval()
    graph, state = nnx.split(evaluated)

    def own(state, images):
        return nnx.merge(graph, state)(images)

    return Entry(lambda: from_nnx(make(), images), own, state, kernel, images)


def with_config(make, kernel):
    return nnx_entry(lambda: make(zoo_nnx.Config(), rngs=nnx.Rngs(0)), kernel)


def imagenet_resnet():
    return linen(
        lambda: zoo_linen.ImageNetResNet([1, 1], zoo_linen.BottleneckBlock, 5),
        "Dense_0/kernel",
        train=False,
    )


def mnist_cnn():
    images = jax.random.normal(KEYS[0], (4, 8, 8, 1))
    return nnx_entry(lambda: zoo_nnx.MnistCNN(rngs=nnx.Rngs(0)), "linear2/kernel", images=images)


def flaxmodels_resnet():
    models = pytest.importorskip("flaxmodels")
    images = jax.nn.sigmoid(jax.random.normal(KEYS[0], (4, 32, 32, 3)))
    make = functools.partial(models.ResNet18, output="logits", pretrained=None, num_classes=5)
    return linen(make, "Dense_0/kernel", images=images, train=False)


def jax_resnet():
    package = pytest.importorskip("jax_resnet")
    make = functools.partial(package.ResNet50, n_classes=5, stage_sizes=[1, 1], hidden_sizes=(4, 8))
    return linen(make, "layers_5/kernel")


def linen_sequential():
    return linen(
        lambda: nn.Sequential(
            [nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean(axis=(1, 2)), nn.Dense(5)]
        ),
        "layers_3/kernel",
    )


def vit_with_config():
    def make():
        transformer = zoo_linen.config(num_layers=1, num_heads=2, mlp_dim=16)
        return zoo_linen.ViT(5, zoo_linen.config(size=(4, 4)), transformer)

    return linen(make, "head/kernel", train=False)


def dictionary_attribute():
    def make():
        return zoo_linen.WithDictionary({"first": 8, "second": 6}, ["classes"])

    return linen(make, "classes/kernel")


def big_vision():
    return linen(zoo_linen.BigVision, "head/kernel", logits=lambda output: output[0])


def tied_embedding():
    return linen(zoo_linen.TiedEmbedding, "labels/embedding")


def raw_parameter():
    return linen(zoo_linen.RawHead, "w")


def einsum_head():
    return linen(lambda: zoo_linen.RawHead(einsum=True), "w")


def head_twice():
    return linen(zoo_linen.HeadTwice, "head/kernel", logits=lambda output: output["logits"])


def returns_dataclass():
    return linen(zoo_linen.ReturnsDataclass, "head/kernel", logits=lambda output: output.logits)


def hugging_face(name, kernel, **options):
    transformers = pytest.importorskip(
        "transformers", minversion="4", reason="needs transformers<5"
    )
    cls = getattr(transformers, f"Flax{name}ForImageClassification", None)
    if cls is None:
        pytest.skip("transformers 5 has no Flax models")
    labels = {str(i): str(i) for i in range(5)}
    config = getattr(transformers, f"{name}Config")(id2label=labels, **options)

    def make():
        return type(cls(config, _do_init=False).module)(config=config)

    return linen(make, kernel, logits=lambda output: output.logits)


def hugging_face_vit():
    return hugging_face(
        "ViT",
        "classifier/kernel",
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )


def hugging_face_resnet():
    return hugging_face(
        "ResNet", "classifier/1/kernel", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]
    )


def nnx_resnet():
    return with_config(zoo_nnx.ResNet, "fc/kernel")


def nnx_densenet():
    return with_config(zoo_nnx.DenseNet, "classifier/kernel")


def nnx_vit():
    return with_config(zoo_nnx.ViT, "head/kernel")


def nnx_convnext():
    return with_config(zoo_nnx.ConvNeXt, "head/kernel")


def nnx_sequential():
    return nnx_entry(lambda: zoo_nnx.sequential(rngs=nnx.Rngs(0)), "layers/3/kernel")


def nnx_lora():
    return nnx_entry(lambda: zoo_nnx.Adapted(rngs=nnx.Rngs(0)), "head/kernel")


def equinox():
    eqx = pytest.importorskip("equinox")
    network = eqx.nn.MLP(192, 5, 8, 1, key=KEYS[1])
    params, rest = eqx.partition(network, eqx.is_array)

    def build():
        def function(params, images):
            return jax.vmap(eqx.combine(params, rest))(images.reshape(len(images), -1))

        return from_apply(function, params, IMAGES)

    def own(params, images):
        return jax.vmap(eqx.combine(params, rest))(images.reshape(len(images), -1))

    return Entry(build, own, params, "layers/1/weight")


def haiku():
    hk = pytest.importorskip("haiku")

    def forward(images):
        x = jax.nn.relu(hk.Conv2D(4, 3)(images)).mean(axis=(1, 2))
        return hk.Linear(5, name="head")(x)

    network = hk.without_apply_rng(hk.transform(forward))
    params = network.init(KEYS[1], IMAGES)
    return Entry(
        lambda: from_apply(network.apply, params, IMAGES),
        network.apply,
        params,
        "head/w",
    )


def keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", minversion="3")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    network = keras.Sequential(
        [
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    network.build(IMAGES.shape)
    params = [variable.value for variable in network.trainable_variables]
    state = [variable.value for variable in network.non_trainable_variables]

    def function(state, params, images):
        return network.stateless_call(params, state, images)

    return Entry(
        lambda: from_apply(jax.tree_util.Partial(function, state), params, IMAGES),
        lambda variables, images: network.stateless_call(*variables, images)[0],
        (params, state),
        "4",
    )


TABLE = [
    imagenet_resnet,
    mnist_cnn,
    flaxmodels_resnet,
    jax_resnet,
    linen_sequential,
    vit_with_config,
    dictionary_attribute,
    big_vision,
    tied_embedding,
    raw_parameter,
    einsum_head,
    head_twice,
    returns_dataclass,
    hugging_face_vit,
    hugging_face_resnet,
    nnx_resnet,
    nnx_densenet,
    nnx_vit,
    nnx_convnext,
    nnx_sequential,
    nnx_lora,
    equinox,
    haiku,
    keras,
]


@pytest.mark.parametrize("make", TABLE, ids=lambda make: make.__name__)
def test_the_model_is_taken_as_it_is(make):
    entry = make()
    model = entry.build()
    assert "/".join(map(str, model.head.kernel)) == entry.kernel

    traces = 0

    @jax.jit
    def outputs(model, variables, images):
        nonlocal traces
        traces += 1
        return model(images), entry.own(variables, images)

    for each in (model, entry.build()):
        (features, logits), own = outputs(each, entry.variables, entry.images)
    assert traces == 1

    assert np.ptp(own) > 1e-3
    np.testing.assert_allclose(logits, own, rtol=1e-5, atol=1e-5)
    kernel, bias = head_parameters(model)
    assert kernel.shape == (features.shape[1], logits.shape[1])
    expected = np.asarray(features, np.float64) @ np.asarray(kernel, np.float64)
    expected += 0 if bias is None else np.asarray(bias, np.float64)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
