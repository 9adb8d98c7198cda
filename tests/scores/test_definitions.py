"""Closed forms against their definitions, by derivatives that `jax.grad` takes, in float64.

What is fitted is fitted here by other means too: dense gradients and dense matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.last_layers import random_examples, random_head, score


def logits_of(params, h):
    return h @ params[0] + params[1]


def kl(params, h):
    log_p = jax.nn.log_softmax(logits_of(params, h))
    return -log_p.mean() - jnp.log(len(log_p))


def flat(gradients):
    """Gradients with respect to kernel and bias `[B, ..., D C + C]`."""
    lead = gradients[1].ndim - 1
    return np.concatenate([np.reshape(g, (*g.shape[:lead], -1)) for g in gradients], axis=-1)


def per_example(function, head, features, derivative=jax.grad):
    params = tuple(map(jnp.asarray, head))
    return jax.vmap(derivative(function), (None, 0))(params, jnp.asarray(features))


def log_likelihoods(head, features):
    """p `[B, C]` and gradients of log p `[B, C, D C + C]`."""
    jacobian = per_example(
        lambda params, h: jax.nn.log_softmax(logits_of(params, h)), head, features, jax.jacobian
    )
    return np.asarray(jax.nn.softmax(features @ head.kernel + head.bias)), flat(jacobian)


def exgrad(head, train, features):
    p, gradients = log_likelihoods(head, features)
    return (p * np.abs(gradients).sum(axis=-1)).sum(axis=-1)


def gini(head, train, features):
    p, _ = log_likelihoods(head, features)
    return -(p * (1 - p)).sum(axis=-1)


def fisher_trace(head, train, features):
    p, gradients = log_likelihoods(head, features)
    return -(p * (gradients**2).sum(axis=-1)).sum(axis=-1)


def grad_uncertainty(head, train, features):
    gradients = per_example(
        lambda params, h: -jax.nn.log_softmax(logits_of(params, h)).sum(), head, features
    )
    return (flat(gradients) ** 2).sum(axis=-1)


def feature_hessian(head, train, features):
    def loss(h, label):
        return -jax.nn.log_softmax(logits_of(head, h))[label]

    traces = [
        jax.vmap(lambda h, y=y: jnp.trace(jax.hessian(loss)(h, y)))(jnp.asarray(features))
        for y in range(head.kernel.shape[1])
    ]
    np.testing.assert_allclose(traces, traces[:1] * len(traces), rtol=1e-10)
    return -np.asarray(traces[0])


def fisher_mahalanobis(head, train, features, damping=1e-3):
    def damped(matrix):
        return matrix + damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))

    x = np.concatenate([train.features, np.ones((len(train.features), 1))], axis=1)
    p = np.asarray(jax.nn.softmax(train.logits))
    size = len(x)
    a = sum(np.outer(row, row) for row in x) / size
    b = sum(np.diag(row) - np.outer(row, row) for row in p) / size
    metric = np.linalg.inv(np.kron(damped(a), damped(b)))
    g = flat(
        per_example(
            lambda params, h: -jax.nn.log_softmax(logits_of(params, h)).max(), head, features
        )
    )
    return -np.einsum("bi,ij,bj->b", g, metric, g)


def scod(head, train, features, rank=None, prior_std=1.0):
    def jacobians(features):
        return flat(per_example(logits_of, head, features, jax.jacobian))

    gauss_newton = sum(j.T @ j for j in jacobians(train.features))
    values, vectors = np.linalg.eigh(gauss_newton)
    # Each eigenvalue comes once for each class.
    kept = len(values) if rank is None else rank * head.kernel.shape[1]
    values, vectors = values[::-1][:kept], vectors[:, ::-1][:, :kept]
    shrinkage = values / (values + 1 / (2 * prior_std**2))
    j = jacobians(features)
    explained = ((j @ vectors) ** 2).sum(axis=1) @ shrinkage
    return -(prior_std**2) * ((j**2).sum(axis=(1, 2)) - explained)


def pnml(head, train, features):
    def with_one(h):
        return np.concatenate([np.ones((len(h), 1)), h / np.linalg.norm(h, axis=1)[:, None]], 1)

    x_train, x = with_one(train.features), with_one(features)
    inverse = np.linalg.pinv(x_train.T @ x_train)
    outside = np.eye(len(inverse)) - inverse @ x_train.T @ x_train
    scores = []
    for row in x:
        p = np.asarray(jax.nn.softmax(row[1:] @ head.kernel + head.bias))
        q = row @ inverse @ row
        kappa = max(row @ outside @ row, q / (1 + q))
        scores.append(-np.log((p / (p + (1 - p) * p**kappa)).sum()) / np.log(len(p)))
    return np.array(scores)


def gradorth(head, train, features, share=0.97):
    _, singular, directions = np.linalg.svd(train.features, full_matrices=False)
    energy = np.cumsum(singular**2) / (singular**2).sum()
    basis = directions[: (energy < share).sum() + 1].T
    gradient, _ = per_example(kl, head, features)
    return np.linalg.norm(basis.T @ np.asarray(gradient), axis=(1, 2))


def gradpca(aggregate, share=0.99):
    def define(head, train, features):
        def gradients(features):
            return flat(per_example(lambda p, h: aggregate(logits_of(p, h)), head, features))

        g = gradients(train.features)
        means = np.stack([g[train.labels == c].mean(axis=0) for c in np.unique(train.labels)])
        centre = means.mean(axis=0)
        _, singular, directions = np.linalg.svd(means - centre, full_matrices=False)
        share_of = np.cumsum(singular**2) / (singular**2).sum()
        basis = directions[: (share_of < share).sum() + 1].T
        centred = gradients(features) - centre
        return ((centred @ basis) ** 2).sum(axis=1) / (centred**2).sum(axis=1)

    return define


def average_gradient(head, train, features):
    def gradients(features):
        kernel, _ = per_example(
            lambda p, h: jax.nn.logsumexp(logits_of(p, h)), head, jnp.asarray(features)
        )
        return np.asarray(kernel).reshape(len(features), -1)

    g, h = gradients(train.features), gradients(features)
    means = np.stack([g[train.labels == c].mean(axis=0) for c in np.unique(train.labels)])
    cosines = h @ means.T / np.linalg.norm(means, axis=1) / np.linalg.norm(h, axis=1)[:, None]
    return cosines.max(axis=1)


def nac(head, train, features, steepness=3.0, usual=0.1, bins=8):
    half = np.log(np.linspace(1, np.sqrt(1e3), bins // 2)) / np.log(1e3)
    edges = np.concatenate([half[:-1], [0.5], 1 - half[-2::-1]])
    edges[-1] = 1.01

    def states(features):
        gradient = jax.vmap(jax.grad(lambda h: kl(head, h)))(jnp.asarray(features))
        return 1 / (1 + np.exp(-steepness * features * np.asarray(gradient)))

    def is_in(states):
        return (states[:, :, None] >= edges[:-1]) & (states[:, :, None] < edges[1:])

    counts = is_in(states(train.features)).sum(axis=0)
    coverage = np.minimum(counts / (usual * len(train.features)), 1)
    return (is_in(states(features)) * coverage).sum(axis=2).mean(axis=1)


def grood(head, train, features):
    classes = np.stack(
        [train.features[train.labels == c].mean(axis=0) for c in np.unique(train.labels)]
    )
    foreign = jnp.asarray(classes.mean(axis=0))

    def loss(foreign, h):
        centres = jnp.concatenate([classes, foreign[None]])
        return -jax.nn.log_softmax(-jnp.linalg.norm(h[None] - centres, axis=1))[0]

    def gradients(features):
        return np.asarray(jax.vmap(jax.grad(loss), (None, 0))(foreign, jnp.asarray(features)))

    correct = train.logits.argmax(axis=1) == train.labels
    # As the bank keeps them.
    bank = gradients(train.features[correct].astype(np.float32).astype(np.float64))
    return -((gradients(features)[:, None] - bank) ** 2).sum(axis=-1).min(axis=1)


def gsc(head, train, features, fraction=0.3):
    scores = []
    for h in jnp.asarray(features):
        gradient = np.asarray(jax.grad(lambda h: logits_of(head, h).max())(h))
        count = int(np.ceil(fraction * len(h)))
        changed = np.array(h)
        changed[np.argsort(-np.abs(gradient))[:count]] = 0
        z, change = jax.jvp(lambda h: logits_of(head, h), (h,), (jnp.asarray(changed) - h,))
        scores.append(jax.nn.logsumexp(z + change))
    return np.array(scores)


DEFINITIONS = {
    "exgrad(sign=1)": exgrad,
    "exgrad(sign=-1)": lambda *args: -exgrad(*args),
    "gini": gini,
    "fisher_trace": fisher_trace,
    "grad_uncertainty": grad_uncertainty,
    "feature_hessian": feature_hessian,
    "fisher_mahalanobis": fisher_mahalanobis,
    "fisher_mahalanobis(damping=0.5)": lambda *args: fisher_mahalanobis(*args, damping=0.5),
    "scod": scod,
    "scod(rank=2,prior_std=0.3)": lambda *args: scod(*args, rank=2, prior_std=0.3),
    "pnml": pnml,
    "gradorth": gradorth,
    "gradorth(share=0.8)": lambda *args: gradorth(*args, share=0.8),
    "gradpca": gradpca(jnp.sum),
    "gradpca(share=0.8)": gradpca(jnp.sum, 0.8),
    "gradpca(aggregate=max)": gradpca(jnp.max),
    "gradpca(aggregate=max,share=0.8)": gradpca(jnp.max, 0.8),
    "average_gradient": average_gradient,
    "nac(steepness=3,usual=0.1,bins=8)": nac,
    "grood": grood,
    "gsc(fraction=0.3)": gsc,
}


@pytest.fixture(scope="module")
def case():
    """A last layer, training images, test images, and the scores of all in one program."""
    with jax.enable_x64(True):
        head = random_head()
        train = random_examples(head)
        features = random_examples(head, 12, seed=2).features * 1.5
        return head, train, features, score(DEFINITIONS, head, train, features)


@pytest.mark.parametrize("spec", DEFINITIONS)
def test_closed_form_is_the_definition(x64, spec, case):
    *data, actual = case
    expected = DEFINITIONS[spec](*data)
    assert np.ptp(expected) > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(actual[spec], expected, rtol=1e-10)
