import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gradnorm_jax.adapters.nnx import from_nnx
from gradnorm_jax.losses import kl_to_uniform
from gradnorm_jax.sharding import batch_mesh, map_batch
from gradnorm_jax.types import Head, head_parameters

IMAGES = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))


class Block(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.conv(x))))


class Network(nnx.Module):
    """A small convolutional network with batch statistics, dropout and a head of either kind."""

    def __init__(self, *, convolution_head=False, transform=None, after=None, seed=0, **options):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([Block(3, 4, rngs=rngs), Block(4, 4, rngs=rngs)])
        size = {"kernel_size": (1, 1)} if convolution_head else {}
        layer = nnx.Conv if convolution_head else nnx.Linear
        self.logits = layer(4, 5, **size, **options, rngs=rngs)
        self.convolution_head = convolution_head
        self.transform = transform
        self.after = after

    def __call__(self, images, *, shift=0.0):
        x = images
        for block in self.blocks:
            x = block(x)
        x = x.mean(axis=(1, 2), keepdims=self.convolution_head) + shift
        match self.transform:
            case "jit":
                x = nnx.jit(lambda layer, x: layer(x))(self.logits, x)
            case "remat":
                x = nnx.remat(lambda layer, x: layer(x))(self.logits, x)
            case _:
                x = self.logits(x)
        x = x.squeeze(axis=(1, 2)) if self.convolution_head else x
        return x if self.after is None else self.after(x)


def trained(**options):
    """A network in training mode whose batch statistics are not their initial values."""
    network = Network(**options)
    network(3 * IMAGES + 1)
    return network


def in_evaluation(network):
    copy = nnx.clone(network)
    copy.eval()
    return copy


def snapshot(network):
    """Everything there is to a module: its structure with all attributes, and its state."""
    graph, state = nnx.split(network)
    return graph, jax.tree.map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        nnx.to_pure_dict(state),
    )


def assert_faithful(model, expected):
    outputs = model(IMAGES)
    np.testing.assert_array_equal(outputs.logits, expected)
    kernel, bias = head_parameters(model)
    product = np.asarray(outputs.features, np.float64) @ np.asarray(kernel, np.float64)
    bias = 0 if bias is None else np.asarray(bias, np.float64)
    np.testing.assert_allclose(expected, product + bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [None, "jit", "remat"])
@pytest.mark.parametrize("convolution_head", [False, True])
def test_features_lead_to_the_logits_of_evaluation_mode(convolution_head, transform):
    network = trained(convolution_head=convolution_head, transform=transform)
    model = from_nnx(network, IMAGES)
    assert model.head == Head(("logits", "kernel"), ("logits", "bias"))
    assert model(IMAGES).features.shape == (8, 4)
    assert_faithful(model, in_evaluation(network)(IMAGES))


def test_a_head_without_bias_and_an_argument_of_the_call():
    network = trained(use_bias=False)
    model = from_nnx(network, IMAGES, shift=2.0)
    assert model.head == Head(("logits", "kernel"))
    own = nnx.jit(lambda network: network(IMAGES, shift=2.0))(in_evaluation(network))
    assert_faithful(model, own)


def test_parameters_are_nested_as_the_module_is():
    network = trained()
    params = from_nnx(network, IMAGES).params
    np.testing.assert_array_equal(params["logits"]["kernel"], network.logits.kernel[...])
    np.testing.assert_array_equal(
        params["blocks"][1]["norm"]["scale"], network.blocks[1].norm.scale[...]
    )
    assert set(params["blocks"][0]["norm"]) == {"scale", "bias"}


def test_module_is_left_as_it_was():
    network = trained()
    graph, state = snapshot(network)
    kernel = network.logits.kernel
    model = from_nnx(network, IMAGES)
    model(IMAGES)
    jax.jit(lambda m, x: m(x))(model, IMAGES)
    graph_after, state_after = snapshot(network)
    assert graph_after == graph
    jax.tree.map(np.testing.assert_array_equal, state_after, state)
    assert type(network.logits) is nnx.Linear
    assert network.logits.kernel is kernel
    assert not network.blocks[0].dropout.deterministic
    assert not network.blocks[0].norm.use_running_average


def test_later_training_of_the_module_does_not_reach_the_model():
    network = trained()
    model = from_nnx(network, IMAGES)
    before = model(IMAGES).logits
    network(10 * IMAGES)
    network.logits.kernel[...] = jnp.zeros((4, 5))
    np.testing.assert_array_equal(model(IMAGES).logits, before)


def test_gradients_are_the_modules_own():
    network = trained()
    model = from_nnx(network, IMAGES)

    def ours(params):
        return kl_to_uniform(model.apply(params, IMAGES).logits).sum()

    gradient = nnx.grad(lambda module: kl_to_uniform(module(IMAGES)).sum())
    with jax.disable_jit():  # what is fused otherwise is rounded otherwise
        actual, own = jax.grad(ours)(model.params), gradient(in_evaluation(network))
    jax.tree.map(np.testing.assert_array_equal, actual, nnx.to_pure_dict(own))


def test_equal_modules_are_traced_once():
    traces = 0

    @jax.jit
    def logits(model, images):
        nonlocal traces
        traces += 1
        return model(images).logits

    for seed in (0, 1):
        network = trained(seed=seed)
        np.testing.assert_allclose(
            logits(from_nnx(network, IMAGES), IMAGES),
            in_evaluation(network)(IMAGES),
            rtol=1e-5,
            atol=1e-6,
        )
    assert traces == 1


def test_split_over_devices_and_mapped_over_examples():
    model = from_nnx(trained(), IMAGES[:2])
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


class Twins(nnx.Module):
    """Layers of one shape, of which the one called `last` yields the logits, times `scale`."""

    def __init__(self, scale=None):
        rngs = nnx.Rngs(0)
        self.last, self.first, self.auxiliary = (nnx.Linear(5, 5, rngs=rngs) for _ in range(3))
        self.scale = scale

    def __call__(self, images, *, again=False):
        x = self.first(images.reshape(len(images), -1)[:, :5])
        x = self.last(nnx.relu(x))
        self.auxiliary(x)
        x = self.last(x) if again else x
        return x if self.scale is None else self.scale * x


def test_the_layer_that_yields_the_result_wins_over_others_of_its_shape():
    model = from_nnx(Twins(), IMAGES)
    assert model.head.kernel == ("last", "kernel")
    assert_faithful(model, Twins()(IMAGES))


def test_the_last_layer_may_be_named():
    assert from_nnx(Twins(), IMAGES, head=("last",)).head.kernel == ("last", "kernel")
    for head in ("first", "lost"):
        with pytest.raises(ValueError, match=rf"a layer '{head}'; they end: .* in last/kernel"):
            from_nnx(Twins(), IMAGES, head=head)


def test_the_last_call_of_a_layer_that_is_called_twice():
    model = from_nnx(Twins(), IMAGES, again=True)
    assert model.head.kernel == ("last", "kernel")
    assert_faithful(model, nnx.jit(lambda network: network(IMAGES, again=True))(Twins()))


@pytest.mark.parametrize(
    ("after", "met"), [(nnx.softmax, "a softmax"), (jnp.negative, "a change of sign")]
)
def test_what_follows_the_head_is_refused(after, met):
    with pytest.raises(ValueError, match=rf"there is {met} .*test_nnx.py:\d+ in __call__"):
        from_nnx(trained(after=after), IMAGES)


def test_a_shape_is_enough_and_nothing_is_run_on_it():
    example = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    model = from_nnx(trained(), example)
    assert model.head == Head(("logits", "kernel"), ("logits", "bias"))


def test_arrays_among_the_arguments_of_the_call_are_leaves():
    model = from_nnx(trained(), IMAGES, shift=jnp.full((8, 4), 2.0))
    own = nnx.jit(lambda network: network(IMAGES, shift=2.0))(in_evaluation(trained()))
    np.testing.assert_allclose(model(IMAGES).logits, own, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(model.function)) == 1
