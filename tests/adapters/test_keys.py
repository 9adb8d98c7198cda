import collections
import dataclasses
import functools
import threading
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gradnorm_jax.adapters.apply import from_apply
from gradnorm_jax.adapters.keys import freeze, static
from gradnorm_jax.adapters.linen import from_linen
from gradnorm_jax.adapters.nnx import from_nnx
from tests.adapters.zoo_linen import Config

IMAGES = jax.random.normal(jax.random.key(0), (4, 8))


@dataclasses.dataclass
class Options:
    width: int
    scales: list


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def scaled(factor):
    return lambda x: factor * x


BUILDS = {
    "list": lambda x: [x, 1],
    "dictionary": lambda x: {"a": {"b": x}},
    "set": lambda x: {1, 2, float(np.sum(x))},
    "dataclass": lambda x: Options(3, [x]),
    "partial": lambda x: functools.partial(scaled, x),
    "namespace": lambda x: types.SimpleNamespace(a=x),
    "object": lambda x: Plain(a=Plain(b=x)),
    "unhashable object": lambda x: Config(a=x),
    "closure": scaled,
    "ordered": lambda x: collections.OrderedDict(a=x),
    "linen": lambda x: nn.Sequential([nn.Dense(3), scaled(x)]),
    "bound method": lambda x: Plain.__init__.__get__(Plain(a=x)),
    "slice": lambda x: [slice(0, float(np.sum(x)))],
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("make", [float, np.full(3, 1.0).__mul__, lambda x: x * jnp.ones(2)])
def test_what_is_built_alike_has_equal_keys(build, make):
    key = freeze(build(make(2.0)))
    assert key == freeze(build(make(2.0)))
    assert hash(key) == hash(freeze(build(make(2.0))))
    assert key != freeze(build(make(3.0)))


def test_what_differs_has_different_keys():
    different = [
        1, 1.0, True, 0.0, -0.0, "1", None, [1], (1,), {"a": 1}, {"b": 1}, np.ones(2),
        np.ones((2, 1)), np.ones(2, np.float32), jnp.ones(2), jax.random.key(0), jax.random.key(1),
        Options(1, []), Plain(width=1, scales=[]), scaled(1), nn.Dense(3), nn.Dense(4),
    ]  # fmt: skip
    keys = [freeze(value) for value in different]
    assert len(set(keys)) == len(keys)
    assert freeze(float("nan")) == freeze(float("nan"))


def test_what_is_changed_in_place_has_another_key():
    for value in (Plain(a=[1]), Config(a=[1]), types.SimpleNamespace(a=[1])):
        before = freeze(value)
        value.a.append(2)
        assert freeze(value) != before


_changed = [1]


def test_a_function_counts_without_the_module_that_it_is_written_in():
    before = freeze(scaled(1.0))
    _changed.append(2)
    assert freeze(scaled(1.0)) == before


def test_circles_and_what_cannot_be_looked_into():
    circle = Plain()
    circle.itself = circle
    other = Plain()
    other.itself = other
    assert freeze(circle) == freeze(other)
    locked = Plain(lock=threading.Lock(), a=1)
    assert freeze(locked) == freeze(locked)
    assert freeze(locked) != freeze(Plain(lock=threading.Lock(), a=1))
    assert static([locked]) == static([locked])
    recursive = jax.jit(lambda x: x)
    assert freeze(recursive) == freeze(recursive)


class WithArray(nn.Module):
    scale: np.ndarray
    widths: list

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.widths[0])(images * jnp.asarray(self.scale)[None])


class Tanh(nnx.Module):
    def __init__(self, config, seed):
        self.config = config
        self.linear = nnx.Linear(8, 5, rngs=nnx.Rngs(seed))

    def __call__(self, images):
        return self.linear(self.config["act"](images))


def counted():
    """A compiled function of a model and images, and the list that grows when it is traced."""
    traces = []

    @jax.jit
    def logits(model, images):
        traces.append(1)
        return model(images).logits

    return logits, traces


def test_other_arrays_in_a_module_give_other_results():
    def module(scale):
        return WithArray(np.full(8, scale, np.float32), [5])

    variables = module(1).init(jax.random.key(1), IMAGES)
    logits, traces = counted()
    for scale in (1, 2, 1, 2):
        model = from_linen(module(scale), variables, IMAGES)
        expected = module(scale).apply(variables, IMAGES)
        np.testing.assert_allclose(logits(model, IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 2


def test_a_model_that_is_rebuilt_is_never_traced_again():
    calls = []

    class Noted(nn.Module):
        options: dict

        @nn.compact
        def __call__(self, images):
            calls.append(1)
            return {"logits": nn.Dense(self.options["classes"][0])(images), "images": images}

    def build(i):
        variables = jax.tree.map(lambda x: x + i, start)
        pick = lambda output: output["logits"]  # noqa: E731 (a new one each time)
        return from_linen(Noted({"classes": [5]}), variables, IMAGES, logits=pick)

    start = Noted({"classes": [5]}).init(jax.random.key(1), IMAGES)
    logits, traces = counted()
    results = [logits(build(0), IMAGES)]
    before = len(calls)
    results += [logits(build(i), IMAGES) for i in range(1, 50)]
    assert len(traces) == 1
    assert len(calls) == before
    assert len({float(result.sum()) for result in results}) == 50


def test_rebuilt_nnx_modules_and_functions_are_never_traced_again():
    logits, traces = counted()
    for seed in range(20):
        logits(from_nnx(Tanh({"act": scaled(2.0)}, seed), IMAGES), IMAGES)
    assert len(traces) == 1

    def build(factor):
        return from_apply(lambda p, x: factor * x @ p["w"], {"w": jnp.eye(8)}, IMAGES)

    for factor in (1.0, 2.0, 1.0, 2.0):
        np.testing.assert_allclose(logits(build(factor), IMAGES), factor * IMAGES, rtol=1e-6)
    assert len(traces) == 3
