"""Options of a detector chosen on validation data."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradnorm_jax.detectors import Detector, Reading, Rectifier, parse_detectors
from gradnorm_jax.detectors.options import show_value
from gradnorm_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Trial:
    """A point of the grid.

    Attributes:
        detector: with these options.
        auroc: its mean AUROC over the validation sets.
        aurocs: that on each of them.
    """

    detector: Detector
    auroc: float
    aurocs: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        detector: the best of the grid; its name holds its options.
        trials: all of the grid, in its order.
        grid: the values that were tried, by option.
    """

    detector: Detector
    trials: Sequence[Trial]
    grid: Mapping[str, Sequence[Any]]

    def __str__(self) -> str:
        """A line for each trial, the best one marked."""
        return "\n".join(
            f"{'*' if t.detector == self.detector else ' '} {100 * t.auroc:6.2f}  {t.detector.name}"
            for t in self.trials
        )


def tune(
    detector: str | Callable[..., Detector | Rectifier | Reading],
    model: Model,
    *,
    id_data: Any,
    ood_validation: Any,
    grid: Mapping[str, Sequence[Any]],
    **options: Any,
) -> Tuned:
    """Chooses a detector's options by the AUROC on validation data: every point of a grid.

    All points are detectors of one evaluation, and so share its forward passes and whatever they
    learn alike. What is tuned on data that are tested on later, on images or kinds of images, has
    seen them: give validation sets of their own. No other data are read than those given here.

    >>> tuned = gj.tune("knn", model, id_data=id_val, ood_validation=noise, fit=train,
    ...                 grid={"k": [10, 50, 200]})
    >>> result = gj.evaluate(model, id_test, ood_test, detectors=[tuned.detector, "msp"], fit=train)

    Args:
        detector: text to which options are added in parentheses, such as "knn" or "react+gradnorm",
            where they are GradNorm's; or a function of options that returns a detector or a
            rectifier: `lambda quantile: compose(react(quantile=quantile), msp())`.
        model: the classifier.
        id_data: in-distribution validation data.
        ood_validation: out-of-distribution validation data, or such by name.
        grid: the values to try by option; all their combinations are tried.
        **options: as in `evaluate`: `fit`, `preprocess`, `batch_size`, `out` and so on.

    Returns:
        The best detector, and all trials. Of equals, the first in the grid is the best.

    Raises:
        ValueError: the grid is empty or holds a point twice, or as in `evaluate`.
    """
    from gradnorm_jax.evaluation.evaluate import evaluate

    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"grid must give at least one value for each option, got {dict(grid)}")
    points = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    detectors = parse_detectors([_at(detector, point) for point in points])
    sets = ood_validation if isinstance(ood_validation, Mapping) else {"OOD": ood_validation}
    result = evaluate(model, id_data, sets, detectors=detectors, **options)
    trials = []
    for each in detectors:
        if each.name in result.not_run:
            raise ValueError(f"{each.name} cannot be tried: {result.not_run[each.name]}")
        aurocs = {name: cell.auroc.value for name, cell in result.metrics[each.name].items()}
        trials.append(Trial(each, sum(aurocs.values()) / len(aurocs), aurocs))
    return Tuned(max(trials, key=lambda trial: trial.auroc).detector, trials, dict(grid))


def _at(
    detector: str | Callable[..., Detector | Rectifier | Reading], point: Mapping[str, Any]
) -> str | Detector | Rectifier | Reading:
    if not isinstance(detector, str):
        return detector(**point)
    return f"{detector}({', '.join(f'{name}={show_value(x)}' for name, x in point.items())})"
