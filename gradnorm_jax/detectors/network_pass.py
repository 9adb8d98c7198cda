"""Passes through the network that several detectors share."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from gradnorm_jax.detectors.detector import Batch, Detector, freeze_options, images_of
from gradnorm_jax.detectors.reading import Reading
from gradnorm_jax.tree import selected_paths
from gradnorm_jax.types import Model

Part = Detector | Reading
"""What may hold passes among its options."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NetworkPass:
    """What is read in further passes through the network, once for all detectors that read it.

    It stands among the options of a detector or a reading, whose function calls it. An evaluation
    takes the passes of all its detectors first, equal ones once, and of those that differ in the
    option `select` alone one with all that is selected. Like a detector it is a value.

    Attributes:
        function: pure `(model, images, **options) -> pytree of arrays [B, ...]`; with an option
            `select`, patterns as of `per_example_grad_norms`, `{path: array}` by parameter.
        options: keyword arguments of `function`, as in `Detector`.

    >>> def largest(state, model, batch, *, norms):
    ...     return jax.numpy.stack(list(norms(model, batch).values())).max(axis=0)
    >>> norms = NetworkPass(scores.gradnorm_by_parameter, {"select": "block4", "ord": 2})
    >>> detector = Detector("largest", "network", largest, options={"norms": norms})
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", freeze_options(str(self.function), self.options))

    def __call__(self, model: Model, batch: Batch) -> Any:
        """What is read of a batch: found there if it has been taken, or else taken now."""
        options, taken = dict(self.options), dict(batch.passes)
        if self.whole not in taken:
            return self.function(model, images_of(batch), **options)
        found = taken[self.whole]
        if "select" not in options:
            return found
        return {path: found[path] for path in selected_paths(found, options["select"])}

    @property
    def whole(self) -> "NetworkPass":
        """The same pass whatever is selected, by which it is found."""
        options = {name: value for name, value in dict(self.options).items() if name != "select"}
        return dataclasses.replace(self, options=options)


def network_passes(part: Part) -> Iterator[NetworkPass]:
    """The passes among the options of a detector or a reading, and among those of its parts."""
    for option in dict(part.options).values():
        if isinstance(option, NetworkPass):
            yield option
        elif isinstance(option, Part):
            yield from network_passes(option)


def take_passes(parts: Iterable[Part], model: Model, batch: Batch) -> Batch:
    """The batch with all passes that detectors and readings hold, so that each is taken once."""
    asked: dict[NetworkPass, list[NetworkPass]] = {}
    for part in parts:
        for each in network_passes(part):
            asked.setdefault(each.whole, []).append(each)
    taken = [(whole, _together(several)(model, batch)) for whole, several in asked.items()]
    return batch._replace(passes=tuple(taken))


def _together(passes: Sequence[NetworkPass]) -> NetworkPass:
    """One pass of all that is selected by several, which differ in nothing else."""
    first, *others = dict.fromkeys(passes)
    if not others:
        return first
    selects: list[Any] = [dict(each.options).get("select") for each in (first, *others)]
    patterns = [(each,) if isinstance(each, str) else each for each in selects]
    union = None if None in selects else tuple(itertools.chain(*patterns))
    return dataclasses.replace(first, options=dict(first.options) | {"select": union})
