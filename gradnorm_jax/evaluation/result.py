"""The result of an evaluation."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import ID, ScoreTable
from gradnorm_jax.metrics import Best, Comparison, Metrics, compare_scores, compare_with_best

HEADLINE = {
    "FPR95 ↓": "fpr_at_95_tpr_id_positive",
    "AUROC ↑": "auroc",
    "AUPR ↑": "aupr_in",
}
"""The metrics of the paper's tables, by what they are called there."""


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

    def __str__(self) -> str:
        """The table of the paper, and what it leaves out, as plain text."""
        # What shows results is built upon them.
        from gradnorm_jax.evaluation.report import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        from gradnorm_jax.evaluation.report import to_html

        return to_html(self)
