"""Networks that are nothing but a last layer, and training images of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.detectors import Batch, parse_detectors
from gradnorm_jax.statistics import Examples
from gradnorm_jax.types import Head, LinearHead, Model, Outputs, Variables


def random_head(num_features=6, num_classes=4, seed=0):
    """A last layer in float64."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(num_features, num_classes)) / np.sqrt(num_features)
    return LinearHead(kernel, rng.normal(size=num_classes) / 2)


def random_examples(head, count=60, seed=1, labels=None):
    """Training images, rectified features of scale 2, of which most are predicted as labelled."""
    rng = np.random.default_rng(seed)
    features = np.maximum(rng.normal(size=(count, len(head.kernel))) + 0.5, 0) * 2
    logits = features @ head.kernel + head.bias
    if labels is None:
        others = rng.integers(head.kernel.shape[1], size=count)
        labels = np.where(rng.random(count) < 0.7, logits.argmax(axis=1), others)
    return Examples(features, logits, labels.astype(np.int32), rng.permutation(count))


def apply(variables, features):
    kernel, bias = variables.params
    return Outputs(features, features @ kernel + bias[None])


def as_model(head, dtype=None):
    """The network that takes features."""
    params = tuple(jnp.asarray(x, dtype) for x in head)
    return Model(jax.tree_util.Partial(apply), Variables(params), Head((0,), (1,)))


@functools.partial(jax.jit, static_argnames="detectors")
def score_fitted(detectors, states, model, batch):
    """Scores by detector, of all in one program."""
    pairs = zip(detectors, states, strict=True)
    return {each.name: each.score(state, model, batch) for each, state in pairs}


def score(specs, head, train, features=None, outputs=None):
    """Scores by detector, each fitted to training images."""
    detectors = parse_detectors(specs)
    states = [each.fit and each.fit.state(head, train) for each in detectors]
    model = as_model(head)
    if outputs is None:
        outputs = apply(model.variables, jnp.asarray(features))
    return score_fitted(detectors, states, model, Batch(None, outputs))
