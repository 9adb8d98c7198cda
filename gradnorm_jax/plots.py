"""Plots of scores from arrays, each a matplotlib Figure: `figure.savefig("scores.png")`.

All functions take scores `[N]`, where higher means more in-distribution (ID). They raise
ModuleNotFoundError if matplotlib is not installed, and ValueError if scores are empty, not
one-dimensional or not finite, or if there is nothing to draw.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradnorm_jax import metrics
from gradnorm_jax.extras import needs_extra
from gradnorm_jax.metrics import ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 50


def histograms(
    id_scores: ArrayLike, ood_scores: Mapping[str, ArrayLike], *, title: str | None = None
) -> "Figure":
    """A row of histograms: ID scores over the scores of each out-of-distribution (OOD) set.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]` by the name of the set.
        title: of the whole figure.

    Returns:
        A panel for each OOD set, with its AUROC. Heights are fractions of each set.
    """
    figure, axes = _panels(1, len(ood_scores))
    for axis, (name, scores) in zip(axes[0], ood_scores.items(), strict=True):
        labelled = [("ID", id_scores), (name, scores)]
        _draw_histograms(axis, labelled, _with_auroc(name, id_scores, scores))
    if title is not None:
        figure.suptitle(_literal(title))
    return figure


def histogram_grid(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    *,
    titles: Mapping[tuple[str, str], str] | None = None,
) -> "Figure":
    """A grid of histograms, detectors by OOD sets: ID scores over OOD scores.

    Args:
        scores: by detector, scores `[N]` by the name of the set. The first set is ID, and all
            detectors have the same sets.
        titles: of panels, by detector and OOD set; the detector and its AUROC where there is none.

    Returns:
        A panel for each detector and OOD set. Heights are fractions of each set.
    """
    sets = [list(each) for each in scores.values()]
    if any(names != sets[0] for names in sets):
        raise ValueError(f"all detectors must have scores of the same sets, got {sets}")
    figure, axes = _panels(len(scores), len(sets[0]) - 1 if sets else 0)
    for row, (detector, by_set) in zip(axes, scores.items(), strict=True):
        (id_name, id_scores), *others = by_set.items()
        for axis, (name, ood_scores) in zip(row, others, strict=True):
            title = (titles or {}).get((detector, name))
            title = title or _with_auroc(detector, id_scores, ood_scores)
            _draw_histograms(axis, [(id_name, id_scores), (name, ood_scores)], title)
    return figure


def roc(
    id_scores: ArrayLike, ood_scores: Mapping[str, ArrayLike], *, title: str | None = None
) -> "Figure":
    """Receiver operating characteristic, a curve for each OOD set: ID passing over OOD passing.

    Args:
        id_scores: `[N]`.
        ood_scores: `[M]` by the name of the set.
        title: of the figure.

    Returns:
        One panel with all curves; the dashed line is chance. The legend gives each AUROC.
    """
    figure, axes = _panels(1, min(len(ood_scores), 1), size=(4.5, 4.5))
    axis = axes[0, 0]
    for name, scores in ood_scores.items():
        ranking = ranked.rank(id_scores, scores)
        passed, found = (np.r_[0, each.cumsum()] / each.sum() for each in (ranking.ood, ranking.id))
        axis.plot(passed, found, label=_literal(_with_auroc(name, id_scores, scores)))
    axis.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
    axis.set(xlabel="Fraction of OOD that passes", ylabel="Fraction of ID that passes")
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=_literal(title or ""))
    axis.legend(loc="lower right", fontsize="small")
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float] = (4, 2.5)) -> tuple[Any, Any]:
    if not (rows and columns):
        raise ValueError("nothing to draw: give the scores of at least one OOD set")
    with needs_extra("plots", "plots"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _with_auroc(name: str, id_scores: ArrayLike, ood_scores: ArrayLike) -> str:
    return f"{name}, AUROC {100 * metrics.auroc(id_scores, ood_scores):.2f} %"


def _literal(text: str) -> str:
    """A label shown as it is: matplotlib reads `$` as mathematics and hides a leading `_`."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _draw_histograms(axis: Any, scores: Sequence[tuple[str, ArrayLike]], title: str) -> None:
    arrays = [(name, ranked.check_scores(name, each)) for name, each in scores]
    edges = _bin_edges(np.concatenate([array for _, array in arrays]))
    for name, array in arrays:
        counts, _ = np.histogram(array, edges)
        axis.stairs(counts / array.size, edges, fill=True, alpha=0.6, label=_literal(name))
    axis.set_title(_literal(title), fontsize="medium")
    axis.set_yticks([])
    axis.locator_params(axis="x", nbins=4)
    axis.legend(loc="upper left", fontsize="small")


def _bin_edges(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of equal bins, distinct even where the scores are all equal or nearly so."""
    low, high = scores.min(), scores.max()
    middle = low / 2 + high / 2  # low + high may overflow
    reach = max(high / 2 - low / 2, 1e-9 * abs(middle), np.finfo(np.float32).tiny)
    edges = middle + reach * np.linspace(-1, 1, _BINS + 1)
    # Rounding must not leave the extreme scores outside.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges
