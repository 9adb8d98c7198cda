"""Runs side by side: tests on the same inputs, which are known by their ids."""

import collections
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradnorm_jax.evaluation.records import ID, ScoreTable
from gradnorm_jax.evaluation.run_config import RunConfig
from gradnorm_jax.evaluation.saved import SavedRun
from gradnorm_jax.evaluation.tables import HEADLINE
from gradnorm_jax.metrics import Comparison, compare_with_best, delong_test, fpr_at_tpr, holm
from gradnorm_jax.metrics.comparison import fpr_difference, fpr_replicates

TESTED = {"AUROC": "auroc", "FPR95 (ID positive)": "fpr_at_95_tpr_id_positive"}
"""The metrics whose differences are tested, by what they are called."""
_LISTED = 3
_REPLICATES = 500

Runs = Mapping[str, SavedRun]
"""Runs by their names."""
Orders = Mapping[tuple[str, str], np.ndarray]
"""By run and data set, its rows in an order that all runs share."""


class Difference(NamedTuple):
    """By how much a metric of a detector in a run exceeds that in the first run.

    Attributes:
        run: its name.
        detector: whose metric it is.
        ood_set: on which data.
        metric: name of a field of `Metrics`.
        comparison: the metric less that of the first run.
        holm_p_value: corrected for all tests of this metric between runs.
    """

    run: str
    detector: str
    ood_set: str
    metric: str
    comparison: Comparison
    holm_p_value: float


def common_sets(runs: Runs) -> list[str]:
    """The OOD sets that all runs have."""
    first, *others = runs.values()
    return [
        name
        for name in first.result.tables
        if name != ID and all(name in run.result.tables for run in others)
    ]


def match_inputs(runs: Runs) -> tuple[Orders, list[str]]:
    """The order of rows in which runs have the same inputs as the first, and what is in doubt.

    A data set of a run has no order if its inputs are not those of the first run.
    """
    (first_name, first), *others = runs.items()
    orders, remarks = {}, []
    for name in [ID, *common_sets(runs)]:
        orders[first_name, name] = order = _by_id(first.result.tables[name])
        for other_name, other in others:
            its = _by_id(other.result.tables[name])
            pair = f"{name} of {first_name} and of {other_name}"
            difference = _difference(first.result.tables[name], other.result.tables[name])
            doubt = _doubt(first, other, name)
            if difference:
                remarks.append(f"{pair} are other inputs, so nothing is tested: {difference}.")
            elif doubt and _has_no_names(first.result.tables[name]):
                remarks.append(f"{pair} may be other inputs, so nothing is tested: {doubt}.")
            else:
                assert len(its) == len(order)
                orders[other_name, name] = its
                remarks += [f"{pair} are matched by id alone: {doubt}."] if doubt else []
    return orders, remarks


def _by_id(table: ScoreTable) -> np.ndarray:
    rows = range(len(table.ids))
    return np.array(sorted(rows, key=lambda row: (table.ids[row], table.positions[row])))


def _difference(first: ScoreTable, other: ScoreTable) -> str:
    ids, its = collections.Counter(first.ids), collections.Counter(other.ids)
    sides = [("only the former", ids - its), ("only the latter", its - ids)]
    return " and ".join(
        f"{only.total()} are in {where} ({', '.join(list(only)[:_LISTED])}"
        f"{', ...' if len(only) > _LISTED else ''})"
        for where, only in sides
        if only
    )


def _doubt(first: SavedRun, other: SavedRun, name: str) -> str:
    one, another = (_identity(run.config, name).get("sha256") for run in (first, other))
    if one is None or another is None:
        return "a data set that is loaded by a function has no fingerprint"
    return "" if one == another else "contents, labels or modification times of files differ"


def _identity(config: RunConfig, name: str) -> dict[str, Any]:
    # A run made of the cache of another has the data of that.
    while "of" in config:
        config = config["of"]
    return config.get("data", {}).get(name, {})


def _has_no_names(table: ScoreTable) -> bool:
    return list(table.ids) == list(map(str, table.positions))


def leaders(runs: Runs, orders: Orders) -> dict[tuple[str, str], Collection[tuple[str, ...]]]:
    """By OOD set and metric, the best run and detector, and those not significantly worse.

    They are chosen among the runs whose inputs are the same.
    """
    found: dict[tuple[str, str], Collection[tuple[str, ...]]] = {}
    for name in common_sets(runs):
        rows = {
            f"{run_name}\0{detector}": (run_name, detector)
            for run_name, run in runs.items()
            if (run_name, ID) in orders and (run_name, name) in orders
            for detector in run.result.metrics
        }
        if len({run_name for run_name, _ in rows.values()}) < 2:
            continue
        id_scores, ood_scores = (
            {key: _scores(runs, orders, *row, each) for key, row in rows.items()}
            for each in (ID, name)
        )
        best = compare_with_best(id_scores, ood_scores, list(HEADLINE.values()))
        for metric, each in best.items():
            found[name, metric] = {rows[key] for key in each.leaders()}
    return found


def differences(runs: Runs, orders: Orders) -> list[Difference]:
    """Each detector that a run shares with the first against itself, where inputs are the same."""
    first, *others = runs
    found = [
        difference
        for run in others
        for name in common_sets(runs)
        if (run, ID) in orders and (run, name) in orders
        for difference in _on_set(runs, orders, run, first, name)
    ]
    corrected = []
    for metric in TESTED.values():
        of_metric = [each for each in found if each.metric == metric]
        adjusted = holm([each.comparison.p_value for each in of_metric])
        corrected += [
            each._replace(holm_p_value=float(p))
            for each, p in zip(of_metric, adjusted, strict=True)
        ]
    return corrected


def _on_set(runs: Runs, orders: Orders, run: str, first: str, name: str) -> Iterator[Difference]:
    detectors = [d for d in runs[run].result.metrics if d in runs[first].result.metrics]
    if not detectors:
        return
    id_scores, ood_scores = (
        [_scores(runs, orders, each, d, of) for each in (run, first) for d in detectors]
        for of in (ID, name)
    )
    # One bootstrap for all.
    rates = fpr_replicates(id_scores, ood_scores, 0.95, "id", _REPLICATES, seed=0)
    count = len(detectors)
    for i, detector in enumerate(detectors):
        pair = id_scores[i], ood_scores[i], id_scores[count + i], ood_scores[count + i]
        auroc = delong_test(*pair)
        yield Difference(run, detector, name, "auroc", auroc, auroc.p_value)
        value = fpr_at_tpr(*pair[:2]) - fpr_at_tpr(*pair[2:])
        sizes = pair[0].size, pair[1].size
        fpr = fpr_difference(value, rates[:, i] - rates[:, count + i], sizes, 0.95)
        yield Difference(run, detector, name, "fpr_at_95_tpr_id_positive", fpr, fpr.p_value)


def _scores(runs: Runs, orders: Orders, run: str, detector: str, name: str) -> np.ndarray:
    scores = runs[run].result.tables[name].scores[detector]
    return scores[orders[run, name]].astype(np.float64)
