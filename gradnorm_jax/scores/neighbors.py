"""Scores by the nearest of many training features, found exactly."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from gradnorm_jax.numerics import as_rows, check_count, to_common_float, unit_rows
from gradnorm_jax.scores.output import energy

_BLOCK = 1 << 24
"""About how many similarities are held at once."""


def knn(features: ArrayLike, bank: ArrayLike, *, k: int = 50) -> jax.Array:
    r"""Negative squared distance to the k-th nearest training feature, all of length one.

    .. math:: S = -\| h / \|h\| - b_{(k)} \|^2

    Args:
        features: `[B, D]`.
        bank: `[M, D]`, training features of length one: `unit_rows` of them.
        k: which neighbour, at most M.

    Returns:
        `[B]`, in [-4, 0]; higher is more in-distribution.

    Raises:
        ValueError: k is out of range, or a shape is not as above.

    References:
        Sun, Ming, Zhu, Li (2022), "Out-of-Distribution Detection with Deep Nearest Neighbors",
        whose code takes the squared distance too. https://arxiv.org/abs/2204.06507
    """
    features, bank = _as_features_and_bank(features, bank, k)
    lengths = (bank**2).sum(axis=1)

    def score(rows: jax.Array) -> jax.Array:
        negative = 2 * _products(rows, bank) - lengths[None]
        return kth_largest(negative, k) - (rows**2).sum(axis=1)

    return jnp.minimum(_in_blocks(score, unit_rows(features), len(bank)), 0.0)


def nnguide(
    features: ArrayLike, logits: ArrayLike, bank: ArrayLike, energies: ArrayLike, *, k: int = 10
) -> jax.Array:
    r"""Energy times the mean similarity to the training features that are most like it.

    .. math:: S = L(z) \cdot \frac{1}{k} \sum_{i \in top k} L_i \langle h / \|h\|, b_i \rangle

    where L is `energy`, logsumexp of the logits.

    Args:
        features: `[B, D]`.
        logits: `[B, C]`.
        bank: `[M, D]`, training features of length one.
        energies: `[M]`, L_i of these.
        k: how many, at most M.

    Returns:
        `[B]` in squared units of the logits; higher is more in-distribution.

    Raises:
        ValueError: k is out of range, or a shape is not as above.

    References:
        Park, Jung, Teoh (2023), "Nearest Neighbor Guidance for Out-of-Distribution Detection".
        https://arxiv.org/abs/2309.14888
    """
    features, bank = _as_features_and_bank(features, bank, k)
    scores, energies, features, bank = to_common_float(energy(logits), energies, features, bank)

    def guidance(rows: jax.Array) -> jax.Array:
        return mean_of_largest(_products(rows, bank) * energies[None], k)

    return scores * _in_blocks(guidance, unit_rows(features), len(bank))


def kth_largest(x: jax.Array, k: int) -> jax.Array:
    """The k-th largest number of each row, `[B, M] -> [B]`, exactly, in time that k is not part of.

    Floats are ordered as the integers that their bits make, up to the sign; the largest integer
    that k numbers reach is found bit by bit.
    """
    check_count("k", k)
    size = x.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{size}")
    top = jnp.asarray(1, unsigned) << (size - 1)
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    ordered = jnp.where(bits >= top, ~bits, bits | top)

    def set_bit(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (top >> i.astype(unsigned))
        reached = (ordered >= candidate[:, None]).sum(axis=1)
        return jnp.where(reached >= k, candidate, low)

    found = jax.lax.fori_loop(0, size, set_bit, jnp.zeros_like(ordered[:, 0]))
    return jax.lax.bitcast_convert_type(jnp.where(found >= top, found ^ top, ~found), x.dtype)


def mean_of_largest(x: jax.Array, k: int) -> jax.Array:
    """The mean of the k largest numbers of each row, `[B, M] -> [B]`."""
    least = kth_largest(x, k)
    above = x > least[:, None]
    # Of those equal to the k-th, only as many count as are missing.
    ties = (k - above.sum(axis=1)).astype(x.dtype)
    return (jnp.where(above, x, jnp.zeros_like(x)).sum(axis=1) + ties * least) / k


def _as_features_and_bank(
    features: ArrayLike, bank: ArrayLike, k: int
) -> tuple[jax.Array, jax.Array]:
    check_count("k", k)
    rows, bank = to_common_float(as_rows("features", features, "D"), as_rows("bank", bank, "D"))
    if rows.shape[1] != bank.shape[1]:
        raise ValueError(
            f"features have {rows.shape[1]} entries, but those of the bank {bank.shape[1]}: fit it "
            "to features of the same network"
        )
    if k > len(bank):
        raise ValueError(f"k={k} neighbours are asked for, but the bank has {len(bank)} rows")
    return rows, bank


def _products(rows: jax.Array, bank: jax.Array) -> jax.Array:
    return jnp.matmul(rows, bank.T, precision=jax.lax.Precision.HIGHEST)


def _in_blocks(score: Callable[[jax.Array], jax.Array], rows: jax.Array, size: int) -> jax.Array:
    """`score` of as many rows at a time as keep `[rows, size]` within bounds."""
    count = max(1, _BLOCK // size)
    if len(rows) <= count:
        return score(rows)
    # As lax.map with a batch_size does, but padded, so that one program serves all blocks.
    blocks = -(-len(rows) // count)
    padded = jnp.pad(rows, ((0, blocks * count - len(rows)), (0, 0)))
    scores = jax.lax.map(score, padded.reshape(blocks, count, -1))
    return scores.reshape(-1)[: len(rows)]
