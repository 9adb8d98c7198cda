"""Taps against `jax.grad` with respect to zeros that are added at the same place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import gradnorm_jax as gj
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.models import MODELS
from gradnorm_jax.per_example.tapping import layer_sites
from gradnorm_jax.sharding import batch_mesh
from tests.per_example import networks


def of_table(name, dtype, **options):
    """A network known by name as a `Model`, and images."""
    module = MODELS[name].build(networks.CLASSES, dtype=dtype, **options)
    images = networks.images(dtype, 32, batch=2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = networks.draw(shapes, dtype)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return module, variables, images


def by_interception(module, variables, images, scalar, layers):
    """Inputs, outputs and cotangents, of Linen modules that are intercepted."""
    seen = {}

    def intercept(probes, next_fun, args, kwargs, context):
        name = "/".join(context.module.path)
        result = next_fun(*args, **kwargs)
        if name not in layers or context.method_name != "__call__":
            return result
        result = result + probes.get(name, jnp.zeros((), result.dtype))
        seen[name] = (args[0], result)
        return result

    def loss(probes, image):
        with nn.intercept_methods(functools.partial(intercept, probes)):
            return scalar(module.apply(variables, image[None]).logits)[0], dict(seen)

    shapes = jax.eval_shape(lambda image: loss({}, image)[1], images[0])
    zeros = {name: jnp.zeros(y.shape, y.dtype) for name, (_, y) in shapes.items()}
    gradient = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, 0)))
    gradients, values = gradient(zeros, images)
    return {n: (x[:, 0], y[:, 0], gradients[n][:, 0]) for n, (x, y) in values.items()}


def assert_taps(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for kind, value, tap in zip(gj.Tap._fields, values, found[name], strict=True):
            assert tap.shape == value.shape
            np.testing.assert_allclose(
                tap, value, tolerance, tolerance * np.abs(value).max(), err_msg=f"{name} {kind}"
            )


NETWORKS = {
    "resnet20_cifar": {"depth": 8},
    "vit_ti16": {"depth": 1, "width": 16, "heads": 2, "patch": 8},
    "bit_r50x1": {"depths": (1, 1), "width": 8, "groups": 4},
    "densenet101_cifar": {"depth": 10, "growth": 4},
    "mobilenet_v2": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_linen_networks(name, x64):
    module, variables, images = of_table(name, jnp.float64, **NETWORKS[name])
    model = gj.from_linen(module, variables, images)
    names = [site.name for site in layer_sites(model, images)]
    if name == "vit_ti16":
        names.remove("cls")  # no layer that can be intercepted

    def scalar(logits):
        return logits.max(axis=-1) + kl_to_uniform(logits)

    expected = by_interception(module, variables, images, scalar, names)
    read = gj.taps(model, names, scalar=lambda outputs: scalar(outputs.logits))
    assert_taps(read(images), expected)


class Classifier(nnx.Module):
    """Batch statistics, a rectifier, pooling; zeros are added where `probes` says."""

    def __init__(self, dtype):
        options = {"param_dtype": dtype, "dtype": dtype, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(3, 6, (3, 3), strides=2, **options)
        self.norm = nnx.BatchNorm(6, use_running_average=True, **options)
        self.norm.mean[...] += 0.3
        self.norm.var[...] *= 2
        self.head = nnx.Linear(6, networks.CLASSES, **options)

    def __call__(self, x, probes=(0.0, 0.0, 0.0, 0.0), sow=None):
        sow = [] if sow is None else sow
        for layer, probe in zip((self.conv, self.norm, nnx.relu, self._pool), probes, strict=True):
            sow.append((x, layer(x) + probe))
            x = sow[-1][1]
        return self.head(x)

    def _pool(self, x):
        return x.mean(axis=(1, 2))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_nnx_and_operations_by_position(devices, x64):
    module, images = Classifier(jnp.float64), networks.images(jnp.float64, 8, batch=5)
    model = gj.from_nnx(module, images)

    def loss(probes, image):
        seen = []
        return kl_to_uniform(module(image[None], probes, seen))[0], seen

    zeros = [jnp.zeros((1, 4, 4, 6))] * 3 + [jnp.zeros((1, 6))]
    gradients, seen = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, 0)))(zeros, images)
    expected = [(x[:, 0], y[:, 0], g[:, 0]) for (x, y), g in zip(seen, gradients, strict=True)]
    expected[0] = (images, *expected[0][1:])
    mesh = batch_mesh(jax.devices()[:devices])
    names = ("conv", "norm", "relu[-1]", "div[-1]")
    expected[3] = (expected[2][1].sum(axis=(1, 2)), *expected[3][1:])
    found = jax.jit(gj.taps(model, names, mesh=mesh))(images)
    assert_taps(found, dict(zip(names, expected, strict=True)))


def test_loops_are_stacks_and_rematerialised_layers_are_found(x64):
    """An MLP in a loop with parameters of its own each turn, before a rematerialised layer."""

    def step(x, layer):
        return jnp.tanh(x @ layer["kernel"] + layer["bias"][None]), None

    def loss_fn(params, batch, probes=None):
        if probes is None:
            x, _ = lax.scan(step, batch, params["loop"])
        else:
            x = batch
            for i in range(3):
                layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["loop"])
                x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None] + probes[i])
        return kl_to_uniform(jax.checkpoint(jnp.matmul)(x, params["head"]))

    params = networks.draw_shapes(
        {"loop": {"kernel": (3, 4, 4), "bias": (3, 4)}, "head": (4, 5)}, jnp.float64
    )
    batch = networks.images(jnp.float64, 4, batch=6)[:, 0, :, 0]
    expected = jax.grad(lambda p: loss_fn(params, batch, p).sum())(jnp.zeros((3, 6, 4)))
    read = gj.taps(loss_fn, what={"cotangent", "output"}, reduce=lambda name, tap: tap.cotangent)
    np.testing.assert_allclose(read(params, batch)["loop"], expected.swapaxes(0, 1), rtol=1e-10)
    outputs = gj.taps(loss_fn, "loop", {"input"})(params, batch)["loop"].input
    np.testing.assert_allclose(outputs[:, 0], batch)
    assert gj.taps(loss_fn, "head", {"input"})(params, batch)["head"].input.shape == (6, 4)


def test_parts_of_a_network():
    """A stage ends after its shortcut is added, and what rectifies that."""
    module, variables, images = of_table("resnet20_cifar", jnp.float32, depth=8)
    model = gj.from_linen(module, variables, images)
    found = gj.taps(model, ["after:layer*"], {"input", "output"})(images)
    assert list(found) == ["after:layer1", "after:layer2", "after:layer3"]
    for first, second in (("after:layer1", "after:layer2"), ("after:layer2", "after:layer3")):
        np.testing.assert_array_equal(found[first].output, found[second].input)
    last = found["after:layer3"].output
    assert last.min() == 0
    np.testing.assert_allclose(last.mean(axis=(1, 2)), model(images).features, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_tapped_is_named():
    network = networks.embedding_tied_with_output(jnp.float32)
    with pytest.raises(ValueError, match="parameter table is used 2 times"):
        gj.taps(network.loss_fn, "table")(network.params, network.batch)
    with pytest.raises(ValueError, match=r"no relu\[0\]: the network has 0 .*tanh"):
        gj.taps(network.loss_fn, "relu[0]")(network.params, network.batch)
    read = gj.taps(network.loss_fn, "kernel", reduce=lambda name, tap: tap.output > 0)
    with pytest.raises(TypeError, match=r"the tap of kernel it returned bool\[6, 7\]: cast it"):
        read(network.params, network.batch)
    unused = {**network.params, "unused": jnp.ones(3)}
    with pytest.raises(ValueError, match="select='unused' names no layer that works on the data"):
        gj.taps(network.loss_fn, ["kernel", "unused"])(unused, network.batch)
    with pytest.raises(ValueError, match="what must be of input, output and cotangent"):
        gj.taps(network.loss_fn, what={"weights"})


def test_only_what_is_needed_is_computed():
    """Of the first layer's output, nothing that comes after it, and no derivative."""
    network = networks.few_rows(jnp.float32)
    read = gj.taps(network.loss_fn, "dense", {"output"}, reduce=lambda name, tap: tap.output.mean())
    program = str(jax.make_jaxpr(read)(network.params, network.batch))
    assert program.count("dot_general") == 1
    assert "conv_general_dilated" not in program


@pytest.mark.parametrize("kind", ["equinox", "haiku"])
def test_other_frameworks(kind, x64):
    images = networks.images(jnp.float64, 8, channels=8)
    function, params, names = {"equinox": _equinox, "haiku": _haiku}[kind](images)
    model = gj.from_apply(function, params, images)
    found = gj.taps(model)(images)
    assert set(found) == set(names)
    conv, head = (found[name] for name in names)
    inputs = images.swapaxes(1, -1) if kind == "equinox" else images
    np.testing.assert_allclose(conv.input.reshape(images.shape), inputs)
    features, logits = model(images)
    np.testing.assert_allclose(head.input, features, rtol=1e-10)
    np.testing.assert_allclose(head.output, logits, rtol=1e-10)
    np.testing.assert_allclose(head.cotangent, gj.softmax_minus_uniform(logits), rtol=1e-10)
    assert conv.output.size == 3 * 6 * 6 * 4 == conv.cotangent.size


def _equinox(images):
    eqx = pytest.importorskip("equinox")
    one, two = jax.random.split(jax.random.key(0))
    net = {"conv": eqx.nn.Conv2d(8, 4, 3, key=one), "head": eqx.nn.Linear(4, 5, key=two)}
    params, rest = eqx.partition(net, eqx.is_array)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)

    def function(params, images):
        net = eqx.combine(params, rest)
        each = images.swapaxes(1, -1)
        x = jax.nn.relu(jax.vmap(net["conv"])(each)).mean(axis=(2, 3))
        return jax.vmap(net["head"])(x)

    return function, params, ("conv", "head")


def _haiku(images):
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(4, 3, padding="VALID", name="conv")(x)).mean(axis=(1, 2))
        return hk.Linear(5, name="head")(x)

    network = hk.without_apply_rng(hk.transform(forward))
    return network.apply, network.init(jax.random.key(0), images), ("conv", "head")
