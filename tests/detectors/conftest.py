import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.detectors import Batch
from gradnorm_jax.types import Head, Model, Outputs, Variables


def apply(variables, images):
    body, head = variables.params["body"], variables.params["head"]
    features = jax.nn.relu(images @ body)
    return Outputs(features, features @ head["kernel"] + head["bias"][None])


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    params = {
        "body": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32),
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
        },
    }
    head = Head(("head", "kernel"), ("head", "bias"))
    return Model(jax.tree_util.Partial(apply), Variables(params), head)


@pytest.fixture
def batch(model):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32)
    return Batch(images, model(images))
