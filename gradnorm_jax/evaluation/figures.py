"""The figures of all detectors on all OOD sets, of which each process computes some."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gradnorm_jax.evaluation.hosts import Interrupted, gather
from gradnorm_jax.evaluation.passes import Execution
from gradnorm_jax.evaluation.peers import check_peers
from gradnorm_jax.evaluation.table import ScoreTable
from gradnorm_jax.metrics import Estimate, Metrics, evaluate_scores


def compare(
    detectors: Sequence[str],
    in_distribution: ScoreTable,
    others: Mapping[str, ScoreTable],
    execution: Execution,
) -> dict[str, dict[str, Metrics]]:
    """How well scores tell one set from each of the others, by detector and set.

    Args:
        detectors: their names.
        in_distribution: their scores; the same in all processes, as are the others.
        others: by the name of the set.
        execution: shows progress, and says when to stop.

    Raises:
        Interrupted: it was stopped.
    """
    process, processes = jax.process_index(), jax.process_count()
    cells = [(detector, name) for detector in detectors for name in others]
    values = np.zeros((len(cells), *(len(dataclasses.fields(x)) for x in (Metrics, Estimate))))
    rounds = range(process, len(cells) + process, processes)
    for cell in execution.track(rounds, "figures", len(rounds)):
        if cell < len(cells):
            detector, name = cells[cell]
            found = evaluate_scores(in_distribution.scores[detector], others[name].scores[detector])
            values[cell] = dataclasses.astuple(found)
        check_peers()
        if execution.stop_here():
            raise Interrupted("stopped; start the same line again to go on")
    metrics: dict[str, dict[str, Metrics]] = {detector: {} for detector in detectors}
    for (detector, name), figures in zip(cells, gather(values).sum(axis=0).tolist(), strict=True):
        metrics[detector][name] = Metrics(*(Estimate(*figure) for figure in figures))
    return metrics
