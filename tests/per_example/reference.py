"""The definition: `jax.grad` of every example's loss, one example after another."""

import jax
import numpy as np


def gradients(network):
    """By path, the gradients `[B, *shape]` in NumPy, in the type of the parameters."""

    def loss(params, example):
        return network.loss_fn(params, jax.tree.map(lambda x: x[None], example))[0]

    gradient = jax.jit(jax.grad(loss))
    size = len(jax.tree.leaves(network.batch)[0])
    examples = [jax.tree.map(lambda x, i=i: x[i], network.batch) for i in range(size)]
    trees = [gradient(network.params, example) for example in examples]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    leaves, _ = jax.tree_util.tree_flatten_with_path(stacked)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def norms(gradients, order):
    """By path, the norms `[B]` in float64."""

    def norm(gradient):
        rows = np.abs(np.asarray(gradient, np.float64)).reshape(len(gradient), -1)
        return (
            np.linalg.norm(rows, order, axis=1)
            if order >= 1
            else (rows**order).sum(1) ** (1 / order)
        )

    return {path: norm(gradient) for path, gradient in gradients.items()}
