"""How long KNN and NNGuide take with a bank of 50,000 x 2048, beside `jax.lax.top_k`.

python experiments/benchmarks/neighbors.py [BATCH_SIZE ...]
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from gradnorm_jax import scores
from gradnorm_jax.numerics import unit_rows

BANK, FEATURES, CLASSES = 50_000, 2048, 1000


@functools.partial(jax.jit, static_argnames="k")
def by_top_k(features, bank, *, k):
    """The score of `scores.knn` by the library's own search."""
    products = jnp.matmul(unit_rows(features), bank.T, precision=jax.lax.Precision.HIGHEST)
    return 2 * jax.lax.top_k(products, k)[0][:, -1] - 2


def seconds(function, repeats=5):
    """Mean time of a call, after one that compiles."""
    jax.block_until_ready(function())
    start = time.perf_counter()
    for _ in range(repeats):
        found = function()
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / repeats


def main():
    """Prints milliseconds a batch."""
    knn, nnguide = (jax.jit(f, static_argnames="k") for f in (scores.knn, scores.nnguide))
    bank = unit_rows(jax.random.normal(jax.random.key(0), (BANK, FEATURES)))
    energies = jnp.ones(BANK)
    for batch_size in map(int, sys.argv[1:] or ["64", "256"]):
        features = jax.random.normal(jax.random.key(1), (batch_size, FEATURES))
        logits = features[:, :CLASSES]
        for k in (50, 1000):
            times = {
                "knn": seconds(lambda: knn(features, bank, k=k)),  # noqa: B023
                "nnguide": seconds(lambda: nnguide(features, logits, bank, energies, k=k)),  # noqa: B023
                "top_k": seconds(lambda: by_top_k(features, bank, k=k)),  # noqa: B023
            }
            shown = "  ".join(f"{name} {1e3 * t:8.1f} ms" for name, t in times.items())
            print(f"{jax.devices()[0].device_kind}  batch {batch_size}  k {k:4}  {shown}")


if __name__ == "__main__":
    main()
