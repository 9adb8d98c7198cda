"""The records that everything is built on: a model, its last layer, and what it yields."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.tree import Params, Path, get_leaf


class Outputs(NamedTuple):
    """What one forward pass of a classifier yields.

    Attributes:
        features: `[B, D]`, the input of the last layer; None where the classifier has none.
        logits: `[B, C]`, its output: `features @ kernel + bias`.
    """

    features: jax.Array
    logits: jax.Array


Step = tuple[Literal["transpose", "reshape"], tuple[int, ...]]
"""What a leaf goes through on its way to a kernel: an order of its axes, or another shape."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Where in `Model.params` the last layer lies.

    Where the network uses the kernel in other places too, as one with tied embeddings does, this is
    about its last use, and so is GradNorm in closed form.

    Attributes:
        kernel: path of the kernel, a leaf of shape `[..., D, C]`, unless `steps` say otherwise.
        bias: path of the bias, a leaf with C entries; None if the layer has none.
        steps: what makes a kernel `[D, C]` of the leaf: a tied embedding `[C, D]` is transposed.
        low_rank: paths of A `[D, r]` and B `[r, C]` where the layer multiplies by kernel + A B, as
            LoRA does.
    """

    kernel: Path
    bias: Path | None = None
    steps: tuple[Step, ...] = ()
    low_rank: tuple[Path, Path] | None = None


class LinearHead(NamedTuple):
    """The arrays of a linear last layer: logits = features @ kernel + bias.

    Attributes:
        kernel: `[D, C]`.
        bias: `[C]`, zeros where the layer has none.
    """

    kernel: Any
    bias: Any


class Variables(NamedTuple):
    """The arrays of a classifier.

    Attributes:
        params: pytree of parameters, all that gradients may be taken with respect to.
        state: pytree of the other arrays that training changes: batch statistics, say.
    """

    params: Params
    state: Any = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A classifier as a pure function, its arrays, and where its last layer is.

    A `Model` is a pytree: its leaves are the arrays of `function` and `variables`, so it passes
    through `jax.jit` as an ordinary argument and never causes a retrace by being rebuilt.

    Attributes:
        function: pure, `(variables, images) -> Outputs`.
        variables: its parameters and its other arrays.
        head: where the last layer's kernel and bias are in `params`; None where there is no linear
            last layer, and so no features.
    """

    function: jax.tree_util.Partial
    variables: Variables
    head: Head | None = dataclasses.field(metadata={"static": True})

    @property
    def params(self) -> Params:
        """The pytree of parameters."""
        return self.variables.params

    @property
    def state(self) -> Any:
        """The pytree of arrays that are no parameters, such as batch statistics."""
        return self.variables.state

    def __call__(self, images: jax.Array) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, ...]`; compiled."""
        return _call(self, images)

    def apply(self, params: Params, images: jax.Array) -> Outputs:
        """The outputs that the model would have with other parameters, to be differentiated."""
        outputs: Outputs = self.function(self.variables._replace(params=params), images)
        return outputs

    def replace(self, *, params: Params, state: Any = None) -> "Model":
        """The same classifier with other arrays, after a step of training, say.

        Args:
            params: a pytree like `self.params`.
            state: a pytree like `self.state`. Parameters and batch statistics belong together, so
                a model that has both must be given both; give `model.state` to keep it.

        Raises:
            ValueError: the model has other arrays than parameters and `state` is not given, or a
                tree has another structure than the one whose place it takes.
        """
        if state is None:
            if jax.tree.leaves((self.state, self.function)):
                raise ValueError(
                    "this model has other arrays than its parameters (batch statistics, say), and "
                    "training moves both: give state= as well, or state=model.state to keep it"
                )
            state = self.state
        new = Variables(params, state)
        before: Any = jax.tree.structure(self.variables)
        after: Any = jax.tree.structure(new)
        if before != after:
            raise ValueError(
                f"the new arrays must have the structure of the model's, {before}, got {after}"
            )
        return Model(self.function, new, self.head)


@jax.jit
def _call(model: Model, images: jax.Array) -> Outputs:
    return model.apply(model.params, images)


def head_parameters(model: Model) -> tuple[jax.Array, jax.Array | None]:
    """The last layer's kernel as `[D, C]` and its bias `[C]`.

    Raises:
        ValueError: the model has no linear last layer.
    """
    head = model.head
    if head is None:
        raise ValueError("the model has no linear last layer, so no kernel and no features")
    kernel = get_leaf(model.params, head.kernel)
    for name, argument in head.steps:
        kernel = getattr(kernel, name)(argument)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    if head.low_rank is not None:
        a, b = (get_leaf(model.params, path) for path in head.low_rank)
        kernel = kernel + (a @ b).astype(kernel.dtype)
    return kernel, None if head.bias is None else get_leaf(model.params, head.bias).reshape(-1)


def linear_head(model: Model) -> LinearHead:
    """The last layer's arrays, its bias zeros if it has none; raises as `head_parameters`."""
    kernel, bias = head_parameters(model)
    return LinearHead(kernel, jnp.zeros_like(kernel[0]) if bias is None else bias)


def on_host(head: LinearHead) -> LinearHead:
    """The last layer's arrays in float64 NumPy, for what is computed once and exactly."""
    return LinearHead(*(np.asarray(x, np.float64) for x in jax.device_get(head)))
