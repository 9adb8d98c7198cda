"""Edited networks against a forward pass written out, to which what the edit changes is added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gradnorm_jax as gj
from gradnorm_jax.sharding import batch_mesh, batch_sharding
from tests.detectors import inner_reference as reference
from tests.per_example import networks

BATCH = 5


def halve(layer, output):
    assert output.shape == (reference.SIZE, reference.SIZE, reference.CHANNELS)
    return output / 2


def model_of(dtype):
    params = reference.make_params(dtype)
    return gj.from_apply(reference.network, params, reference.make_images(2, dtype))


def halved_by_hand(params, images, *names):
    """Outputs and layers of the network in which some layers, in order, put out half."""
    seen = reference.forward(params, images)[2]
    probes = jax.tree.map(jnp.zeros_like, seen)
    for name in names:
        probes[name] = -reference.forward(params, images, probes)[2][name] / 2
    return reference.forward(params, images, probes)


@pytest.mark.parametrize("name", ["after:block1", "block2/norm", "after:last"])
def test_the_network_goes_on_from_the_edit(name, x64):
    model, images = model_of(jnp.float64), reference.make_images(BATCH, jnp.float64)
    found = gj.edited(model, name, halve)(images)
    expected = halved_by_hand(model.params, images, name)[:2]
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12)


@pytest.mark.slow
def test_an_edited_model_is_a_model(x64):
    """Tapped, differentiated and edited again."""
    model, images = model_of(jnp.float64), reference.make_images(BATCH, jnp.float64)
    once = gj.edited(model, "after:block1", halve)
    seen = halved_by_hand(model.params, images, "after:block1")[2]
    tap = gj.taps(once, "after:block2", {"output"})(images)["after:block2"]
    np.testing.assert_allclose(tap.output, seen["after:block2"], rtol=1e-12)
    twice = gj.edited(once, "after:block2", halve)
    expected = halved_by_hand(model.params, images, "after:block1", "after:block2")[1]
    np.testing.assert_allclose(twice(images).logits, expected, rtol=1e-12)

    def loss(params):
        return once.apply(params, images).logits.std()

    def loss_by_hand(params):
        return halved_by_hand(params, images, "after:block1")[1].std()

    found, expected = (jax.jit(jax.grad(f))(model.params) for f in (loss, loss_by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-14), found, expected)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_devices(devices):
    model, images = model_of(jnp.float32), reference.make_images(8, jnp.float32)
    expected = halved_by_hand(model.params, images, "after:block1")[1]
    split = jax.device_put(images, batch_sharding(batch_mesh(jax.devices()[:devices])))
    edited = gj.edited(model, "after:block1", halve)
    for found in (edited(split), jax.jit(lambda m, x: m(x))(edited, split)):
        np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)


def test_every_turn_of_a_loop_is_edited(x64):
    def step(x, kernel):
        return jnp.tanh(x @ kernel), None

    def network(params, images):
        x, _ = lax.scan(step, images, params["loop"])
        return x @ params["head"]

    params = networks.draw_shapes({"loop": (3, 4, 4), "head": (4, 5)}, jnp.float64)
    images = networks.images(jnp.float64, 4, batch=6)[:, 0, :, 0]
    model = gj.from_apply(network, params, images)
    found = gj.edited(model, "loop", lambda layer, output: 2 * output)(images).logits
    doubled = {"loop": 2 * params["loop"], "head": params["head"]}
    np.testing.assert_allclose(found, network(doubled, images), rtol=1e-12)


def test_edits_made_anew_compile_nothing():
    model, images = model_of(jnp.float32), reference.make_images(BATCH, jnp.float32)
    traces = []

    def count(layer, output):
        traces.append(layer)
        return output

    for _ in range(2):
        gj.edited(model, ["after:block1"], count)(images)
    assert traces == ["after:block1"]


def test_what_an_edit_returns_is_checked():
    model, images = model_of(jnp.float32), reference.make_images(BATCH, jnp.float32)
    message = r"like the output of after:stem, float32\[6, 6, 6\]; it returned float32\[6\]"
    with pytest.raises(TypeError, match=message):
        gj.edited(model, "after:stem", lambda layer, output: output.mean(axis=(0, 1)))(images)
    with pytest.raises(ValueError, match="select='none' matched no parameters"):
        gj.edited(model, "none", halve)(images)
