import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from gradnorm_jax.adapters.linen import from_linen
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.sharding import batch_mesh, map_batch
from gradnorm_jax.types import Head, head_parameters

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (8, 6, 6, 3))


class Network(nn.Module):
    """A small convolutional network with batch statistics, dropout and a head of either kind."""

    classes: int = 5
    width: int = 4
    head_name: str = "head"
    convolution_head: bool = False
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    transform: str | None = None
    after: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(self.width, (3, 3), strides=2, dtype=self.dtype)(images)
        # In bfloat16 Flax's own normalisation needs implicit promotion, which is off in the tests.
        x = nn.BatchNorm(use_running_average=not train)(nn.relu(x).astype(jnp.float32))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x.mean(axis=(1, 2), keepdims=self.convolution_head)
        layer = nn.Conv if self.convolution_head else nn.Dense
        layer = getattr(nn, self.transform)(layer) if self.transform else layer
        size = (self.classes, (1, 1)) if self.convolution_head else (self.classes,)
        x = layer(*size, use_bias=self.use_bias, name=self.head_name, dtype=self.dtype)(x)
        x = x.squeeze(axis=(1, 2)) if self.convolution_head else x
        match self.after:
            case "softmax":
                return nn.softmax(x)
            case "scale":
                return 1.05 * x
            case "pair":
                return x, x
        return x


def trained(network):
    """Variables whose batch statistics are not their initial values."""
    variables = network.init(jax.random.key(1), IMAGES, train=False)
    _, updates = network.apply(
        variables, 3 * IMAGES + 1, train=True, mutable="batch_stats", rngs={"dropout": KEY}
    )
    return {**variables, **updates}


def assert_faithful(model, expected, **tolerance):
    outputs = model(IMAGES)
    np.testing.assert_array_equal(outputs.logits, expected)
    kernel, bias = head_parameters(model)
    product = np.asarray(outputs.features, np.float64) @ np.asarray(kernel, np.float64)
    bias = 0 if bias is None else np.asarray(bias, np.float64)
    np.testing.assert_allclose(np.asarray(expected, np.float64), product + bias, **tolerance)


@pytest.mark.parametrize("transform", [None, "jit", "remat"])
@pytest.mark.parametrize("convolution_head", [False, True])
def test_features_lead_to_the_networks_own_logits(convolution_head, transform):
    network = Network(head_name="logits", convolution_head=convolution_head, transform=transform)
    variables = trained(network)
    model = from_linen(network, variables, IMAGES, train=False)
    assert model.head == Head(("logits", "kernel"), ("logits", "bias"))
    assert model(IMAGES).features.shape == (8, 4)
    assert_faithful(model, network.apply(variables, IMAGES, train=False), rtol=1e-5, atol=1e-6)


def test_a_head_without_bias():
    network = Network(use_bias=False)
    variables = trained(network)
    model = from_linen(network, variables, IMAGES, train=False)
    assert model.head == Head(("head", "kernel"))
    assert_faithful(model, network.apply(variables, IMAGES, train=False), rtol=1e-5, atol=1e-6)


def test_bfloat16_layers():
    network = Network(dtype=jnp.bfloat16)
    variables = trained(network)
    model = from_linen(network, variables, IMAGES, train=False)
    assert model(IMAGES).logits.dtype == jnp.bfloat16
    assert_faithful(model, network.apply(variables, IMAGES, train=False), rtol=0.02, atol=0.02)


def test_gradients_are_the_networks_own():
    network = Network()
    variables = trained(network)
    model = from_linen(network, variables, IMAGES, train=False)

    def own(params):
        logits = network.apply({**variables, "params": params}, IMAGES, train=False)
        return kl_to_uniform(logits).sum()

    def ours(params):
        return kl_to_uniform(model.apply(params, IMAGES).logits).sum()

    with jax.disable_jit():  # what is fused otherwise is rounded otherwise
        actual, expected = jax.grad(ours)(model.params), jax.grad(own)(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_module_and_variables_are_left_as_they_were():
    network = Network()
    variables = trained(network)
    before = jax.tree.map(np.array, variables)
    description = repr(network)
    model = from_linen(network, variables, IMAGES, train=False)
    model(IMAGES)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert repr(network) == description
    _, state = network.apply(variables, IMAGES, train=False, mutable=True)
    assert state.keys() == variables.keys()


def test_equal_modules_are_traced_once_with_other_variables_too():
    traces = 0

    @jax.jit
    def logits(model, images):
        nonlocal traces
        traces += 1
        return model(images).logits

    variables = trained(Network())
    other = jax.tree.map(lambda x: x + 1, variables)
    for these in (variables, other):
        model = from_linen(Network(), these, IMAGES, train=False)
        np.testing.assert_allclose(
            logits(model, IMAGES),
            Network().apply(these, IMAGES, train=False),
            rtol=1e-5,
            atol=1e-5,
        )
    assert traces == 1


@pytest.mark.parametrize("transform", [None, "jit", "remat"])
def test_split_over_devices_and_mapped_over_examples(transform):
    network = Network(transform=transform)
    variables = trained(network)
    model = from_linen(network, variables, IMAGES[:2], train=False)
    expected = model(IMAGES)

    def one(model, image):
        return jax.tree.map(lambda x: x[0], model(image[None]))

    def gradients(model, images):
        def loss(params, image):
            return kl_to_uniform(model.apply(params, image[None]).logits).sum()

        return jax.vmap(jax.grad(loss), in_axes=(None, 0))(model.params, images)

    mesh = batch_mesh()
    split = jax.jit(map_batch(lambda model, images: model(images), mesh))(model, IMAGES)
    mapped = jax.jit(jax.vmap(one, in_axes=(None, 0)))(model, IMAGES)
    for outputs in (split, mapped):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), outputs, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.jit(map_batch(gradients, mesh))(model, IMAGES),
        gradients(model, IMAGES),
    )


def test_a_shape_is_enough_and_nothing_is_run_on_it():
    network = Network()
    shapes = jax.eval_shape(lambda: trained(network))
    example = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    model = from_linen(network, shapes, example, train=False)
    assert model.head == Head(("head", "kernel"), ("head", "bias"))
    assert jax.eval_shape(model, example).features.shape == (8, 4)


def test_frozen_and_partitioned_variables():
    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, images):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(5, kernel_init=init)(images.reshape(len(images), -1))

    variables = freeze(Partitioned().init(KEY, IMAGES))
    model = from_linen(Partitioned(), variables, IMAGES)
    assert head_parameters(model)[0].shape == (108, 5)
    assert_faithful(model, Partitioned().apply(variables, IMAGES), rtol=1e-4, atol=1e-5)


class Twins(nn.Module):
    """Layers of one shape, of which the one called `last` yields the logits, times `scale`."""

    scale: float | None = None

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)[:, :5]
        last = nn.Dense(5, name="last")
        x = nn.Dense(5, name="first")(x)
        x = last(nn.relu(x))
        nn.Dense(5, name="auxiliary")(x)
        return x if self.scale is None else self.scale * x

    @nn.compact
    def shared(self, images):
        layer = nn.Dense(5, name="layer")
        return layer(layer(images.reshape(len(images), -1)[:, :5]))


def test_the_layer_that_yields_the_result_wins_over_others_of_its_shape():
    variables = Twins().init(KEY, IMAGES)
    model = from_linen(Twins(), variables, IMAGES)
    assert model.head.kernel == ("last", "kernel")
    assert_faithful(model, Twins().apply(variables, IMAGES), rtol=1e-5, atol=1e-6)


def test_the_last_layer_may_be_named():
    variables = Twins().init(KEY, IMAGES)
    for head in ("last", "last/kernel", ("last",)):
        model = from_linen(Twins(), variables, IMAGES, head=head)
        assert model.head == Head(("last", "kernel"), ("last", "bias"))
    for head in ("first", "lost"):
        with pytest.raises(ValueError, match=rf"a layer '{head}'; they end: .* in last/kernel"):
            from_linen(Twins(), variables, IMAGES, head=head)
    with pytest.raises(ValueError, match=r"a multiplication by a constant \(mul, .*test_linen"):
        from_linen(Twins(scale=1.0), variables, IMAGES, head="last")


def test_the_last_call_of_a_layer_that_is_called_twice():
    variables = Twins().init(KEY, IMAGES, method="shared")
    model = from_linen(Twins(), variables, IMAGES, method="shared")
    assert model.head == Head(("layer", "kernel"), ("layer", "bias"))
    own = jax.jit(lambda variables: Twins().apply(variables, IMAGES, method="shared"))(variables)
    assert_faithful(model, own, rtol=1e-5, atol=1e-6)


class PooledAfter(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(5, name="head")(images).mean(axis=(1, 2))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, images):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(5)(x), None

        scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan()(images.reshape(len(images), -1)[:, :5], None)[0]


@pytest.mark.parametrize(
    ("network", "met", "cure"),
    [
        (
            PooledAfter(),
            r"a mean over positions \(pooling\) \(div, .*test_linen",
            "find_head=False",
        ),
        (Scanned(), r"a loop \(scan, .*test_linen", "gradnorm_of_parameters"),
    ],
)
def test_a_head_before_pooling_or_under_a_scan_is_refused(network, met, cure):
    variables = network.init(KEY, IMAGES)
    with pytest.raises(ValueError, match=rf"{met}.*{cure}"):
        from_linen(network, variables, IMAGES)


@pytest.mark.parametrize("after", ["softmax", "scale"])
def test_what_follows_the_head_is_refused(after):
    network = Network(after=after)
    met = {"softmax": "a softmax", "scale": "a multiplication by a constant"}[after]
    with pytest.raises(ValueError, match=rf"there is {met} .*test_linen.py:\d+ in __call__"):
        from_linen(network, trained(network), IMAGES, train=False)


def test_a_pair_of_the_same_logits_is_accepted():
    network = Network(after="pair")
    variables = trained(network)
    model = from_linen(network, variables, IMAGES, train=False)
    expected = network.apply(variables, IMAGES, train=False)[0]
    np.testing.assert_allclose(model(IMAGES).logits, expected, rtol=1e-5, atol=1e-6)


def test_mistaken_variables_are_told_how():
    how = r'\{"params": state.params, "batch_stats": state.batch_stats\}'
    variables = trained(Network())
    state = SimpleNamespace(params=variables["params"], step=0)
    for mistaken in ({"batch_stats": {}}, variables["params"], state):
        with pytest.raises(ValueError, match=how):
            from_linen(Network(), mistaken, IMAGES)


def test_arrays_among_the_arguments_of_the_call_are_leaves():
    traces = 0

    @jax.jit
    def logits(model, images):
        nonlocal traces
        traces += 1
        return model(images).logits

    network, variables = Network(), trained(Network())
    results = []
    for seed in (0, 1):
        rngs = {"dropout": jax.random.key(seed)}
        expected, _ = network.apply(variables, IMAGES, train=True, rngs=rngs, mutable="batch_stats")
        model = from_linen(network, variables, IMAGES, train=True, rngs=rngs, mutable="batch_stats")
        results.append(logits(model, IMAGES))
        np.testing.assert_allclose(results[-1], expected, rtol=1e-4, atol=1e-5)
    assert traces == 1
    assert not np.allclose(*results)


def test_under_the_users_jit_and_grad():
    network, variables = Network(), trained(Network())

    @jax.jit
    def gradients(variables, images):
        def loss(params):
            model = from_linen(network, {**variables, "params": params}, images, train=False)
            return kl_to_uniform(model(images).logits).sum()

        return jax.grad(loss)(variables["params"])

    def own(params):
        logits = network.apply({**variables, "params": params}, IMAGES, train=False)
        return kl_to_uniform(logits).sum()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradients(variables, IMAGES),
        jax.grad(own)(variables["params"]),
    )


def test_batch_statistics_are_not_left_behind():
    network, variables = Network(), trained(Network())
    model = from_linen(network, variables, IMAGES, train=False)
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])
    state = {"batch_stats": jax.tree.map(lambda x: 2 * x + 1, variables["batch_stats"])}
    with pytest.raises(ValueError, match=r"other arrays than its parameters .*give state= as well"):
        model.replace(params=params)
    with pytest.raises(ValueError, match="must have the structure of the model's"):
        model.replace(params=params["head"], state=state)
    with pytest.raises(TypeError, match="params"):
        dataclasses.replace(model, params=params)
    moved = model.replace(params=params, state=state)
    expected = network.apply({"params": params, **state}, IMAGES, train=False)
    np.testing.assert_allclose(moved(IMAGES).logits, expected, rtol=1e-5, atol=1e-5)
    kept = model.replace(params=params, state=model.state)
    expected = network.apply({**variables, "params": params}, IMAGES, train=False)
    np.testing.assert_allclose(kept(IMAGES).logits, expected, rtol=1e-5, atol=1e-5)
