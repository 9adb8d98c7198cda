"""Rectifiers: what is done to features before a detector sees them, and how the two compose."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.detectors.detector import Batch, Detector, Fit, freeze_options
from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead, Model, Outputs, linear_head


@dataclasses.dataclass(frozen=True)
class Rectifier:
    """A change to features, or to the last layer, that a detector then works behind.

    On its own it stands for itself with `energy`, which is what its paper proposes.

    Attributes:
        name: what tables and files call it.
        rectify: pure function `(state, head, outputs, **options) -> Outputs` with a `LinearHead`;
            `state` is None unless there is a fit.
        fit: how the state is learned; None if there is none.
        options: keyword arguments of `rectify`, as in `Detector`.
        changes_head: whether its logits are those of another last layer, which a rectifier of
            features that comes after it would not know.

    >>> clipped = Rectifier("relu6", lambda state, head, outputs: scores.outputs_of(
    ...     jax.nn.relu6(outputs.features), *head))
    >>> detector = compose(clipped, detectors.msp())
    """

    name: str
    rectify: Callable[..., Outputs]
    fit: Fit | None = None
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    changes_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", freeze_options(self.name, self.options))

    def __call__(self, state: Any, head: LinearHead, outputs: Outputs) -> Outputs:
        """The rectified features and the logits that go with them."""
        return self.rectify(state, head, outputs, **dict(self.options))


def compose(rectifier: Rectifier, detector: Detector) -> Detector:
    """The detector of rectified features and logits, fitted to such if it is fitted.

    >>> compose(detectors.react(quantile=0.95), detectors.gradnorm())

    Args:
        rectifier: what is done first.
        detector: any that needs no more than features and logits, itself composed perhaps.

    Raises:
        ValueError: the detector runs the network again, which would know nothing of the rectifier;
            or a change of features would undo one of the last layer.
    """
    if detector.needs == "network":
        raise ValueError(
            f"{detector.name} runs the network again, which {rectifier.name} does not reach: take "
            "a detector that needs only features and logits"
        )
    inner = dict(detector.options).get("rectifier")
    if rectifier.changes_head and isinstance(inner, Rectifier):
        raise ValueError(
            f"{inner.name} computes the logits anew, and so undoes {rectifier.name}: put "
            f"{rectifier.name} last of the rectifiers"
        )
    return Detector(
        f"{rectifier.name}+{detector.name}",
        "outputs",
        _score,
        _fit(rectifier, detector.fit),
        {"rectifier": rectifier, "detector": detector},
    )


class _States(NamedTuple):
    rectifier: Any
    detector: Any


class _Rectified(NamedTuple):
    """A statistic of rectified outputs, and what rectifies them."""

    head: LinearHead
    state: Any
    value: Any


def _score(
    state: _States | None, model: Model, batch: Batch, *, rectifier: Rectifier, detector: Detector
) -> jax.Array:
    own, inner = state or (None, None)
    outputs = rectifier(own, linear_head(model), batch.outputs)
    return detector.score(inner, model, Batch(None, outputs))


@functools.cache
def _fit(rectifier: Rectifier, fit: Fit | None) -> Fit | None:
    """What both learn; the detector's statistics are of outputs that are rectified already."""
    if rectifier.fit is None and fit is None:
        return None
    own = () if rectifier.fit is None else rectifier.fit.statistics
    inner = () if fit is None else tuple(_rectified(rectifier, s) for s in fit.statistics)

    def finalize(head: LinearHead, *values: Any) -> _States:
        state = None if rectifier.fit is None else rectifier.fit.finalize(head, *values[: len(own)])
        if fit is None:
            return _States(state, None)
        return _States(state, fit.finalize(head, *(v.value for v in values[len(own) :])))

    return Fit((*own, *inner), finalize)


@functools.cache
def _rectified(rectifier: Rectifier, statistic: Statistic) -> Statistic:
    """The statistic of rectified outputs, learned after what the rectifier learns."""
    own = () if rectifier.fit is None else rectifier.fit.statistics
    inner = tuple(_rectified(rectifier, s) for s in statistic.after)

    def init(head: LinearHead, *values: Any) -> _Rectified:
        state = None if rectifier.fit is None else rectifier.fit.finalize(head, *values[: len(own)])
        known = (v.value for v in values[len(own) :])
        state = jax.tree.map(np.asarray, state)
        return _Rectified(head, state, statistic.init(head, *known))

    def update(value: _Rectified, examples: Examples) -> _Rectified:
        state, head, features, logits = jax.tree.map(
            jnp.asarray, (value.state, value.head, examples.features, examples.logits)
        )
        rectified = rectifier(state, head, Outputs(features, logits))
        features, logits = map(np.asarray, rectified)
        changed = examples._replace(features=features, logits=logits)
        return value._replace(value=statistic.update(value.value, changed))

    def merge(left: _Rectified, right: _Rectified) -> _Rectified:
        return left._replace(value=statistic.merge(left.value, right.value))

    def remark(value: _Rectified) -> str | None:
        return statistic.remark(value.value)

    name = f"{statistic.name} after {rectifier.name}"
    return Statistic(name, init, update, merge, (*own, *inner), remark, statistic.needs_labels)
