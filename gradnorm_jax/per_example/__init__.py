"""Per-example gradients of any pure loss, at the cost of one ordinary backward pass.

The loss of one example is traced to a program, in which three things change before `jax.grad` and
`jax.vmap` do the rest:

- convolutions get a kernel gradient made of matrix products (`convolution`), which batches well;
- a kernel that enters the loss at one place (`analysis`) has the norm of its gradient measured
  there, a few examples at a time or without any gradient (`layers`);
- the examples are split over devices before the compiler sees them (`placement`).

In the same program, layers are found from where their parameters meet the data (`sites`), and what
passes through them is read on the way (`passes`): taps (`tapping`). Or it is replaced (`editing`).

Where a gradient is a product it may be left as its factors (`factors`), to be added up over the
examples when squared (`squares`) or multiplied by those of others (`gram`).
"""

from gradnorm_jax.norms import combine_norms
from gradnorm_jax.per_example.api import (
    LossFn,
    per_example_grad_norms,
    per_example_grads,
    per_example_reduce,
)
from gradnorm_jax.per_example.editing import Edit, edited
from gradnorm_jax.per_example.engine import FallbackWarning
from gradnorm_jax.per_example.gram import gradient_gram
from gradnorm_jax.per_example.passes import Tap
from gradnorm_jax.per_example.squares import squared_gradient_sums
from gradnorm_jax.per_example.tapping import taps

__all__ = [
    "Edit",
    "FallbackWarning",
    "LossFn",
    "Tap",
    "combine_norms",
    "edited",
    "gradient_gram",
    "per_example_grad_norms",
    "per_example_grads",
    "per_example_reduce",
    "squared_gradient_sums",
    "taps",
]
