"""A network in which the outputs of some layers are replaced on the way."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

from gradnorm_jax.per_example.arguments import as_partial
from gradnorm_jax.per_example.passes import edit_outputs
from gradnorm_jax.per_example.placement import find_placement, spread
from gradnorm_jax.per_example.program import trace_function
from gradnorm_jax.per_example.tapping import as_hashable, find_in
from gradnorm_jax.tree import Select
from gradnorm_jax.types import Model, Outputs, Variables

Edit = Callable[[str, jax.Array], jax.Array]
"""`(layer, output of one example) -> output` of the same shape and type."""


def edited(model: Model, select: Select, edit: Edit) -> Model:
    """The same network, that goes on from what `edit` makes of the outputs of some layers.

    Everything that takes a `Model` takes it: detectors, `taps`, `evaluate`. Nothing of the network
    is written anew: layers are found in the traced program, as for `taps`. A call costs a forward
    pass, and can be differentiated.

    >>> def clip(layer, output):
    ...     return jnp.minimum(output, 1.0)
    >>> clipped = edited(model, "after:block4", clip)
    >>> clipped(images).logits

    Args:
        model: the network.
        select: which layers, as of `taps`; in a loop (`jax.lax.scan`) each of its turns.
        edit: pure function `(layer, output) -> output` of one example, whose output has no axis for
            the batch. Arrays that it needs are best bound by `jax.tree_util.Partial`.

    Returns:
        A model of the same arrays. Its last layer is where it was; the features and logits are
        those of the edited network, so logits = features @ kernel + bias unless what is edited lies
        between the two.

    Raises:
        ValueError: when it is called, as of `taps`.
        TypeError: when it is called, if `edit` returns another shape or type.
    """
    function = Partial(_Edited(as_hashable(select)), model.function, as_partial(edit))
    return dataclasses.replace(model, function=function)


@dataclasses.dataclass(frozen=True)
class _Edited:
    """A function that compares by what is selected, so that edits made anew compile nothing."""

    select: Select

    def __call__(
        self, function: Partial, edit: Partial, variables: Variables, images: jax.Array
    ) -> Outputs:
        def share_fn(shared: Any, images: jax.Array) -> Outputs:
            function, edit, variables = shared
            sites = find_in(trace_function, function, variables, images, self.select)
            fixed = jax.tree.leaves((function, variables))
            structure = jax.tree.structure(jax.eval_shape(function, variables, images))

            def of_example(image: jax.Array) -> Outputs:
                results = edit_outputs(sites, edit, [*fixed, image])
                return jax.tree.unflatten(structure, results)

            if len(images) == 1:
                # Traced in turn, for taps say, its layers have one axis for the batch, not two.
                return jax.tree.map(lambda x: x[None], of_example(images[0]))
            return jax.vmap(of_example)(images)

        return spread(share_fn, find_placement(images, None))((function, edit, variables), images)
