"""The three records that everything is built on: `Outputs`, `Head`, `Model`."""

import dataclasses
from typing import Any, NamedTuple

import jax

Params = Any
"""A pytree of arrays."""

Path = tuple[str | int, ...]
"""Keys that lead from the root of a parameter tree to one leaf or subtree."""


class Outputs(NamedTuple):
    """What one forward pass of a classifier yields.

    Attributes:
        features: `[B, D]`, the input of the last layer.
        logits: `[B, C]`, its output: `features @ kernel + bias`.
    """

    features: jax.Array
    logits: jax.Array


@dataclasses.dataclass(frozen=True)
class Head:
    """Where in `Model.params` the last layer lies.

    Attributes:
        kernel: path of the kernel, a leaf of shape `[D, C]` or `[1, 1, D, C]`.
        bias: path of the bias, a leaf of shape `[C]`; None if the layer has none.
    """

    kernel: Path
    bias: Path | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A classifier as a pure function, its parameters, and where its last layer is.

    A `Model` is a pytree: its leaves are the arrays of `apply` and `params`, so it passes through
    `jax.jit` as an ordinary argument and never causes a retrace by being rebuilt.

    Attributes:
        apply: pure function `(params, images) -> Outputs`. Arrays that are not parameters (batch
            statistics, say) ride in the `Partial`.
        params: the pytree of parameters, all that gradients may be taken with respect to.
        head: where the last layer's kernel and bias are in `params`.
    """

    apply: jax.tree_util.Partial
    params: Params
    head: Head = dataclasses.field(metadata={"static": True})

    def __call__(self, images: jax.Array) -> Outputs:
        """Features `[B, D]` and logits `[B, C]` of `images` `[B, ...]`."""
        outputs: Outputs = self.apply(self.params, images)
        return outputs


def get_path(tree: Params, path: Path) -> Any:
    """The leaf or subtree of nested mappings `tree` at `path`; KeyError if there is none."""
    for key in path:
        tree = tree[key]
    return tree


def leaf_path(entries: tuple[Any, ...]) -> Path:
    """The path of a leaf, from the entries that `jax.tree_util` gives with it.

    Raises:
        ValueError: there are containers on the way other than mappings and sequences.
    """
    return tuple(_key(entry) for entry in entries)


def _key(entry: Any) -> str | int:
    match entry:
        case jax.tree_util.DictKey(key=key) | jax.tree_util.SequenceKey(idx=key):
            return key
    raise ValueError(f"params must be nested mappings and sequences, got a node with {entry!r}")


def replace_path(tree: Params, path: Path, value: Any) -> Params:
    """A tree like `tree` with `value` in place of the leaf at `path`."""
    return jax.tree_util.tree_map_with_path(
        lambda entries, leaf: value if leaf_path(entries) == path else leaf, tree
    )


def head_parameters(model: Model) -> tuple[jax.Array, jax.Array | None]:
    """The last layer's kernel as `[D, C]`, a 1x1 convolution's flattened, and its bias `[C]`."""
    kernel = get_path(model.params, model.head.kernel)
    bias = None if model.head.bias is None else get_path(model.params, model.head.bias)
    return kernel.reshape(kernel.shape[-2:]), bias
