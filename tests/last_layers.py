"""Networks that are nothing but a last layer, and training images of them."""

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


def score(spec, head, train, features, dtype=None, jit=True):
    """Scores of a detector that is fitted to training images."""
    (detector,) = parse_detectors([spec])
    state = detector.fit and detector.fit.state(head, train)
    model = as_model(head, dtype)
    rows = jnp.asarray(features, dtype)
    batch = Batch(rows, apply(model.variables, rows))
    run = jax.jit(detector.score) if jit else detector.score
    return run(state, model, batch)
