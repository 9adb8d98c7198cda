from gradnorm_jax.norms import combine_norms
from gradnorm_jax.per_example.api import (
    LossFn,
    per_example_grad_norms,
    per_example_grads,
    per_example_reduce,
)
from gradnorm_jax.per_example.engine import FallbackWarning

__all__ = [
    "FallbackWarning",
    "LossFn",
    "combine_norms",
    "per_example_grad_norms",
    "per_example_grads",
    "per_example_reduce",
]
