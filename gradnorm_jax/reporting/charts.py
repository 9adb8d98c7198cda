"""Charts of scores `[N]` by data set, of which the first is in-distribution (ID)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradnorm_jax import metrics
from gradnorm_jax.calibration.conformal import tpr_interval
from gradnorm_jax.metrics import Estimate, ranked
from gradnorm_jax.reporting import svg
from gradnorm_jax.reporting.markup import Element
from gradnorm_jax.reporting.svg import Axes, Axis

COLOURS = 7
"""How many sets have colours of their own before these come again."""
POINTS = 400
"""How many inputs of each set a scatter plot shows."""
_BINS = 50
_ROUNDS = 8
_CURVE = 120
_CONFIDENCE = 0.95
_TAIL = 0.005

Columns = Mapping[str, np.ndarray]
"""Numbers `[N]` by data set."""


class Chart(NamedTuple):
    """A drawing with its title, and what its colours stand for: style class and text."""

    title: str
    drawing: Element
    legend: Sequence[tuple[str, str]] = ()


def colours(sets: Sequence[str]) -> dict[str, str]:
    """The style class of each set."""
    return {name: f"set-{i and (i - 1) % COLOURS + 1}" for i, name in enumerate(sets)}


def histogram(detector: str, scores: Columns, name: str, auroc: float) -> Chart:
    """ID scores and those of the OOD set `name`, as fractions of each set.

    The dashed line is the threshold that 95 % of ID pass.

    Args:
        detector: whose scores they are.
        scores: by data set.
        name: of an OOD set.
        auroc: how well it is told from ID.
    """
    (id_name, id_scores), by_set = next(iter(scores.items())), colours(list(scores))
    shown = {id_name: id_scores, name: scores[name]}
    x = _axis("score", list(shown.values()))
    edges = np.linspace(x.low, x.high, _BINS + 1)
    heights = {
        key: np.histogram(np.clip(values, x.low, x.high), edges)[0] / values.size
        for key, values in shown.items()
    }
    axes = Axes(x, Axis("fraction", 0.0, 1.05 * max(each.max() for each in heights.values())))
    marks = [
        svg.area(
            axes.place(np.repeat(edges, 2), [0, *np.repeat(height, 2), 0]), f"area {by_set[key]}"
        )
        for key, height in heights.items()
    ]
    threshold = metrics.threshold_at_tpr(id_scores)
    marks.append(svg.line(axes.place([threshold] * 2, [0, axes.y.high]), "rule"))
    legend = [(by_set[key], key) for key in shown]
    label = f"Histograms of {detector} for {id_name} and {name}"
    drawing = svg.draw(axes, label, *marks, ticks_of_y=False)
    return Chart(f"{name}: AUROC {100 * auroc:.2f} %", drawing, legend)


def roc(detector: str, scores: Columns, aurocs: Mapping[str, Estimate]) -> Chart:
    """The ROC curve of each OOD set, with a band for each of its points.

    Args:
        detector: whose scores they are.
        scores: by data set.
        aurocs: by OOD set.
    """
    (_, id_scores), *others = scores.items()
    by_set = colours(list(scores))
    axes = Axes(Axis("OOD that passes as ID", 0.0, 1.0), Axis("ID that passes", 0.0, 1.0))
    curves = {name: roc_curve(id_scores, ood_scores) for name, ood_scores in others}
    marks = [
        svg.area(axes.place(*_around(curve)), f"band {by_set[name]}")
        for name, curve in curves.items()
    ]
    marks.append(svg.line(axes.place([0, 1], [0, 1]), "rule"))
    marks += [
        svg.line(axes.place(curve.fpr, curve.tpr), f"line {by_set[name]}")
        for name, curve in curves.items()
    ]
    legend = [
        (by_set[name], f"{name} {100 * x.value:.2f} [{100 * x.low:.2f}, {100 * x.high:.2f}]")
        for name, x in aurocs.items()
    ]
    drawing = svg.draw(axes, f"ROC curves of {detector}", *marks)
    return Chart("ROC curves, AUROC in percent", drawing, legend)


class RocCurve(NamedTuple):
    """Points `[K]` of a ROC curve, ID being positive, and how far each may be off.

    Rates and ends of intervals: the FPR and the TPR of a threshold are within theirs together with
    a confidence of 95 %.
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    fpr_interval: NDArray[np.float64]
    tpr_interval: NDArray[np.float64]


def roc_curve(id_scores: np.ndarray, ood_scores: np.ndarray) -> RocCurve:
    """At most 242 points of the curve, evenly spread over either rate.

    Intervals `[K, 2]` are those of Clopper and Pearson of the two rates, which are independent.
    """
    ranking = ranked.rank(id_scores, ood_scores)
    passing = [np.r_[0, counts.cumsum()] for counts in (ranking.ood, ranking.id)]
    chosen = [
        np.searchsorted(each, np.linspace(0, each[-1], _CURVE + 1, dtype=int)) for each in passing
    ]
    at = np.unique(np.concatenate([[0], *chosen, [len(passing[0]) - 1]]))
    level = math.sqrt(_CONFIDENCE)
    rates, intervals = [], []
    for each in passing:
        estimates = [tpr_interval(int(passed), int(each[-1]), level) for passed in each[at]]
        rates.append(np.array([estimate.value for estimate in estimates]))
        intervals.append(np.array([(estimate.low, estimate.high) for estimate in estimates]))
    return RocCurve(*rates, *intervals)


def _around(curve: RocCurve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The edge of a band: where few of OOD and many of ID pass, and back where it is otherwise."""
    (fpr_low, fpr_high), (tpr_low, tpr_high) = curve.fpr_interval.T, curve.tpr_interval.T
    return np.r_[fpr_low, fpr_high[::-1]], np.r_[tpr_high, tpr_low[::-1]]


def scatter(
    title: str, x: Columns, y: Columns, titles: tuple[str, str], product: float | None = None
) -> Chart:
    """Two numbers of each input, of at most `POINTS` inputs of each set, drawn by lot.

    Args:
        title: of the chart.
        x: by data set.
        y: of the same inputs.
        titles: of the axes.
        product: where x y is equal to it there is a dashed line.
    """
    by_set = colours(list(x))
    axes = Axes(_axis(titles[0], list(x.values())), _axis(titles[1], list(y.values())))
    rng = np.random.default_rng(0)
    chosen = {name: rng.permutation(len(each))[:POINTS] for name, each in x.items()}
    # In turns, so that no set hides the others.
    marks = [
        svg.dots(axes.place(x[name][turn], y[name][turn]), f"dots {by_set[name]}")
        for turns in zip(*(np.array_split(rows, _ROUNDS) for rows in chosen.values()), strict=True)
        for name, turn in zip(chosen, turns, strict=True)
    ]
    if product is not None:
        across = np.linspace(max(axes.x.low, 1e-30), axes.x.high, _CURVE)
        along = across[(product >= axes.y.low * across) & (product <= axes.y.high * across)]
        marks += [svg.line(axes.place(along, product / along), "rule")] if along.size else []
    legend = [(class_, name) for name, class_ in by_set.items()]
    return Chart(title, svg.draw(axes, title, *marks), legend)


def _axis(title: str, columns: Sequence[np.ndarray]) -> Axis:
    """From the lowest to the highest number, but for half a percent of a set at either end."""
    ends = np.array([np.quantile(each.astype(np.float64), [_TAIL, 1 - _TAIL]) for each in columns])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    # Wide enough for distinct numbers where the scores are equal or nearly so.
    margin = max(0.02 * (high - low), 1e-6 * max(abs(low), abs(high)), 1e-30)
    return Axis(title, low - margin, high + margin)
