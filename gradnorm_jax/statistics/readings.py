"""Statistics of something else than features: of what is read inside the network."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from gradnorm_jax.statistics.statistic import Examples, Statistic
from gradnorm_jax.types import LinearHead


class Read(NamedTuple):
    """A statistic of rows whose width is not known before the first of them.

    Attributes:
        width: `[]`, K; 0 before.
        classes: `[]`, C.
        known: values of the statistics that it comes after.
        value: of the statistic itself.
    """

    width: np.ndarray
    classes: np.ndarray
    known: tuple[Any, ...]
    value: Any


@functools.cache
def of_reading(statistic: Statistic, reading: Any) -> Statistic:
    """The statistic of rows that are read of the network, in place of features.

    They are `[B, K]`, or `[B, R, K]` where an image has R of them.

    Args:
        statistic: one that looks at features, logits and labels.
        reading: a `detectors.Reading`. If it is fitted itself, this is learned after that.
    """
    inner = tuple(of_reading(s, reading) for s in statistic.after)
    before = () if reading.fit is None else reading.fit.statistics

    def start(width: int, classes: int, known: tuple[Any, ...]) -> Read:
        head = LinearHead(np.zeros((width, classes)), np.zeros(classes))
        value = statistic.init(head, *known)
        return Read(np.array(width), np.array(classes), known, value)

    def init(head: LinearHead, *values: Any) -> Read:
        return start(0, len(head.bias), tuple(v.value for v in values[: len(inner)]))

    def update(value: Read, examples: Examples) -> Read:
        if not value.width:
            value = start(examples.features.shape[-1], int(value.classes), value.known)
        return value._replace(value=statistic.update(value.value, examples))

    def merge(left: Read, right: Read) -> Read:
        if not (left.width and right.width):
            return left if left.width else right
        return left._replace(value=statistic.merge(left.value, right.value))

    def remark(value: Read) -> str | None:
        return statistic.remark(value.value)

    return dataclasses.replace(
        statistic,
        name=f"{statistic.name} of {reading.name}",
        init=init,
        update=update,
        merge=merge,
        after=(*inner, *before),
        remark=remark,
        reading=reading,
    )
