"""The records that make a detector: `Batch`, `Fit`, `Detector`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax

from gradnorm_jax.statistics.statistic import Examples, Statistic, learn, passes
from gradnorm_jax.types import LinearHead, Model, Outputs, on_host

Needs = Literal["logits", "outputs", "network"]
"""What a score reads: logits alone, features and logits, or the network itself once more."""


class Batch(NamedTuple):
    """What a detector sees of a batch.

    Attributes:
        images: `[B, ...]`, as the network takes them; None when only cached outputs are at hand.
        outputs: of the forward pass that all detectors share.
        passes: what further passes of the same images have found, by `NetworkPass`, as pairs.
    """

    images: jax.Array | None
    outputs: Outputs
    passes: tuple[tuple[Any, Any], ...] = ()


def images_of(batch: Batch) -> jax.Array:
    """The images, which a batch has where `score` has let a detector of the network see it."""
    assert batch.images is not None
    return batch.images


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a detector's state follows from what is learned of in-distribution training data.

    `finalize` is a function of a module rather than a lambda, so that equal detectors compare
    equal.

    Attributes:
        statistics: what is learned, in one pass that all detectors share, or as many as need be.
        finalize: `(head, *values of statistics) -> state`, a pytree of arrays for `Detector.score`;
            `head` is a `LinearHead` of float64 NumPy arrays.
    """

    statistics: tuple[Statistic, ...]
    finalize: Callable[..., Any]

    @property
    def needs_labels(self) -> bool:
        """Whether the training data must be labelled."""
        return any(s.needs_labels for several in passes(self.statistics) for s in several)

    def state(self, head: LinearHead, examples: Examples) -> Any:
        """The state that follows from examples in memory."""
        head = on_host(head)
        known = learn(self.statistics, head, [examples])
        return self.finalize(head, *(known[s] for s in self.statistics))


@dataclasses.dataclass(frozen=True)
class Detector:
    """A score in the shape that the evaluation gives to all scores.

    A detector is a value: equal name, function and options make equal detectors, and as a static
    argument of `jax.jit` one that is built anew compiles nothing. That holds for functions of a
    module; a lambda is another function each time it is made.

    Attributes:
        name: what tables and files call it.
        needs: "logits" if these suffice, "outputs" if it reads features too, "network" if it runs
            the network again.
        score_fn: pure function `(state, model, batch, **options) -> [B]`, higher = more
            in-distribution. `state` is None unless there is a fit.
        fit: how the state is learned; None if there is none.
        options: keyword arguments of `score_fn`, given as a mapping and kept as sorted pairs. Lists
            become tuples. Arrays belong in the state.
        optional: where it needs labels and the training data have none, leave it out and report
            that, rather than raise. Set for the members of a group such as `all`; two detectors
            that differ in nothing else are equal.

    Raises:
        ValueError: a field is not as above.

    >>> def negative_entropy(state, model, batch, *, scale):
    ...     log_p = jax.nn.log_softmax(batch.outputs.logits)
    ...     return scale * (jax.numpy.exp(log_p) * log_p).sum(axis=-1)
    >>> detector = Detector("entropy", "logits", negative_entropy, options={"scale": 1.0})
    """

    name: str
    needs: Needs
    score_fn: Callable[..., jax.Array]
    fit: Fit | None = None
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    optional: bool = dataclasses.field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise ValueError(f"name must be a text that is not empty, got {self.name!r}")
        if self.needs not in get_args(Needs):
            raise ValueError(
                f'needs must be "logits", "outputs" or "network", got {self.needs!r} for detector '
                f"{self.name!r}"
            )
        if not callable(self.score_fn):
            raise ValueError(
                f"score_fn must be a function (state, model, batch, **options) -> [B], got "
                f"{self.score_fn!r} for detector {self.name!r}"
            )
        object.__setattr__(self, "options", freeze_options(self.name, self.options))

    def score(self, state: Any, model: Model, batch: Batch) -> jax.Array:
        """Scores a batch.

        Args:
            state: what `fit.finalize` gave; None for detectors without a fit.
            model: the network.
            batch: `[B, ...]` images, with the outputs that the network gives of them.

        Returns:
            `[B]`; higher is more in-distribution.

        Raises:
            ValueError: the batch lacks what the detector needs.
        """
        if self.needs == "network" and batch.images is None:
            raise ValueError(
                f"detector {self.name!r} runs the network again and needs the images, but only the "
                "outputs of an earlier pass are at hand"
            )
        if self.needs == "outputs" and batch.outputs.features is None:
            raise ValueError(
                f"detector {self.name!r} needs features, but the model has no linear last layer "
                "whose input they would be: take a detector that needs none, such as msp, energy, "
                'or gradnorm(select="all"), the score `gradnorm_of_parameters`'
            )
        return self.score_fn(state, model, batch, **dict(self.options))


def freeze_options(
    name: str, options: Mapping[str, Any] | tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, Any], ...]:
    """Options as sorted pairs; ValueError that names the detector if one cannot be hashed."""
    frozen = {option: _freeze(value) for option, value in dict(options).items()}
    for option, value in frozen.items():
        _check_hashable(name, option, value)
    return tuple(sorted(frozen.items()))


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _check_hashable(detector: str, option: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError as error:
        raise ValueError(
            f"option {option} of detector {detector!r} must be hashable, got a "
            f"{type(value).__name__}: give numbers, texts or tuples, and arrays through a Fit"
        ) from error
