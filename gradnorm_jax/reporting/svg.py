"""The axes of a small chart, and what is drawn on them, as SVG that style sheets colour."""

import math
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnorm_jax.reporting.markup import Element, element

WIDTH, HEIGHT = 300, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 20, 32
_TICKS = 4
_NAMESPACE = "http://www.w3.org/2000/svg"


class Axis(NamedTuple):
    """An axis from `low` to `high`, which must not be equal, with a title."""

    title: str
    low: float
    high: float


class Axes(NamedTuple):
    """Where values are on a chart."""

    x: Axis
    y: Axis

    def place(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Positions `[N, 2]` of values `[N]`; those beyond an axis are at its end."""
        right, down = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        across = _LEFT + _fraction(self.x, x) * (right - _LEFT)
        return np.stack([across, down - _fraction(self.y, y) * (down - _TOP)], axis=-1)


def _fraction(axis: Axis, values: ArrayLike) -> NDArray[np.float64]:
    return np.clip((np.asarray(values) - axis.low) / (axis.high - axis.low), 0, 1)


def draw(axes: Axes, label: str, *marks: Element, ticks_of_y: bool = True) -> Element:
    """A chart of `marks`, described by `label` for those who do not see it."""
    x, y = axes
    grid, texts = [], []
    for value in _ticks(x):
        ((across, down),) = axes.place([value], [y.low])
        grid.append(f"M{across:.1f} {_TOP}V{down:.1f}")
        texts.append(_text(_number(value), across, down + 13, "middle"))
    for value in _ticks(y) if ticks_of_y else ():
        ((across, down),) = axes.place([x.low], [value])
        grid.append(f"M{across:.1f} {down:.1f}H{WIDTH - _RIGHT}")
        texts.append(_text(_number(value), across - 5, down + 3.5, "end"))
    texts.append(_text(x.title, (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 4, "middle"))
    texts.append(_text(y.title, 0 if ticks_of_y else _LEFT, _TOP - 9, "start"))
    return element(
        "svg",
        element("path", class_="grid", d="".join(grid)),
        *marks,
        *texts,
        xmlns=_NAMESPACE,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
    )


def line(points: NDArray[np.float64], class_: str) -> Element:
    """A line through positions `[N, 2]`."""
    return element("path", class_=class_, d=_path(points))


def area(points: NDArray[np.float64], class_: str) -> Element:
    """The area inside of positions `[N, 2]`."""
    return element("path", class_=class_, d=f"{_path(points)}Z")


def dots(points: NDArray[np.float64], class_: str) -> Element:
    """A dot at each of the positions `[N, 2]`: the round ends of lines of no length."""
    return element("path", class_=class_, d="".join(f"M{x:.1f} {y:.1f}h0" for x, y in points))


def _path(points: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _text(text: str, x: float, y: float, anchor: str) -> Element:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _ticks(axis: Axis) -> list[float]:
    """About `_TICKS` round numbers within an axis, 1, 2 or 5 times a power of 10 apart."""
    rough = (axis.high - axis.low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{value:.4g}")
