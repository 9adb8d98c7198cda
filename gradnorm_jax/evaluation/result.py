"""The result of an evaluation."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import FIT, ID, ScoreTable
from gradnorm_jax.evaluation.tables import HEADLINE, Headline
from gradnorm_jax.evaluation.views import to_html, to_text
from gradnorm_jax.metrics import Best, Comparison, Metrics, compare_scores, compare_with_best

_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """How well detectors tell an in-distribution set from out-of-distribution sets.

    `print(result)` shows the table of the paper; so does a notebook. `result["gradnorm", "svhn"]`
    are the metrics of a detector on an OOD set, each with its interval:
    `result["gradnorm", "svhn"].auroc.value`. `result.compare("gradnorm", "energy")` tells whether
    one is better than the other.

    Attributes:
        tables: scores of the in-distribution inputs under the name "ID", then of each OOD set.
        metrics: by detector and OOD set.
        accuracy: fraction of ID inputs with a known label that is predicted; None if that cannot be
            known.
        not_run: why a detector was left out, by its name.
        fit_excluded: the training inputs that could not be used.
        warnings: a sentence on everything that may not be as it seems.
    """

    tables: Mapping[str, ScoreTable]
    metrics: Mapping[str, Mapping[str, Metrics]]
    accuracy: float | None = None
    not_run: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fit_excluded: Sequence[Excluded] = ()
    warnings: Sequence[str] = ()

    def __getitem__(self, key: tuple[str, str]) -> Metrics:
        """The metrics of `(detector, OOD set)`; KeyError that lists both if there are none."""
        detector, name = key
        if detector not in self.metrics or name not in self.metrics[detector]:
            raise KeyError(
                f"no metrics of {key}; detectors: {', '.join(self.metrics)}; OOD sets: "
                f"{', '.join(name for name in self.tables if name != ID)}"
            )
        return self.metrics[detector][name]

    @property
    def scores(self) -> dict[tuple[str, str], np.ndarray]:
        """Scores `[N]` by detector and data set, `result.scores["gradnorm", "ID"]`."""
        return {
            (detector, name): scores
            for name, table in self.tables.items()
            for detector, scores in table.scores.items()
        }

    @functools.cached_property
    def best(self) -> dict[str, dict[str, Best]]:
        """By OOD set and metric of the headline, the best detector against each of the others.

        The tests of one metric on one set are one family for Holm's correction. Empty if there are
        not two detectors.
        """
        if len(self.metrics) < 2:
            return {}
        sets = {
            name: {detector: table.scores[detector] for detector in self.metrics}
            for name, table in self.tables.items()
        }
        return {
            name: compare_with_best(sets[ID], scores, list(HEADLINE.values()))
            for name, scores in sets.items()
            if name != ID
        }

    def compare(self, a: str, b: str) -> dict[str, dict[str, Comparison]]:
        """Whether detector `a` is better than `b`, by paired tests on the same inputs.

        Args:
            a: name of a detector.
            b: name of another.

        Returns:
            By OOD set and name of a field of `Metrics`, the metric of `a` less that of `b`; see
            `metrics.compare_scores`. Not corrected for the number of tests.

        Raises:
            KeyError: there is no such detector.
        """
        for detector in (a, b):
            if detector not in self.metrics:
                raise KeyError(f"no scores of {detector!r}; detectors: {', '.join(self.metrics)}")
        id_a, id_b = (self.tables[ID].scores[detector] for detector in (a, b))
        return {
            name: compare_scores(id_a, table.scores[a], id_b, table.scores[b])
            for name, table in self.tables.items()
            if name != ID
        }

    @property
    def headline(self) -> Headline:
        """What the table of the paper is made of."""
        return Headline(self.metrics, self.best, self.not_run)

    def __str__(self) -> str:
        """The table of the paper, and what it leaves out, as plain text."""
        return to_text(self.headline, [*data_sets(self), *remarks(self)])

    def _repr_html_(self) -> str:
        return to_html(self.headline, [*data_sets(self), *remarks(self)])


def data_sets(result: Result) -> list[str]:
    """A sentence on each data set."""
    lines = [f"{name}: {len(table.ids)} inputs" for name, table in result.tables.items()]
    if result.accuracy is not None:
        lines[0] += f", top-1 accuracy {100 * result.accuracy:.2f} %"
    return lines


def remarks(result: Result) -> list[str]:
    """The warnings, and a sentence on each detector and input that the tables leave out."""
    lines = [*result.warnings]
    lines += [f"{detector} was not run: {why}." for detector, why in result.not_run.items()]
    excluded = {name: table.excluded for name, table in result.tables.items()}
    for name, inputs in {**excluded, FIT: result.fit_excluded}.items():
        # Those that look like images and are not come first: they are the surprise.
        inputs = sorted(inputs, key=lambda each: each.position < 0)
        if inputs:
            listed = "; ".join(f"{each.id} ({each.reason})" for each in inputs[:_LISTED])
            more = f"; and {len(inputs) - _LISTED} more" if len(inputs) > _LISTED else ""
            lines.append(f"{name}: {len(inputs)} files were excluded: {listed}{more}.")
    return lines
