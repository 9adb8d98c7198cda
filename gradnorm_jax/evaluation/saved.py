"""A finished run, read from its folder."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.journal import Journal, read_journal
from gradnorm_jax.evaluation.records import FIT, ID, ScoreTable, select_scores
from gradnorm_jax.evaluation.result import Result
from gradnorm_jax.evaluation.run_config import CONFIG, RunConfig, read_config
from gradnorm_jax.evaluation.storage import open_folder, read_table
from gradnorm_jax.metrics import Best, Comparison, Estimate, Metrics

_METRICS = "metrics.json"
_DEMO = "results"
_AGAIN = "run the command that wrote it again"


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What the folder of a finished run holds.

    Attributes:
        address: of the folder.
        config: what decided the results.
        result: the results.
        recorded: what was kept of each input beside the scores, `[N]` by name and data set: "msp",
            the confidence, and "feature_norm" and "residual_norm", the factors of GradNorm. Of each
            all data sets or none.
        journal: where the images are, and how long each pass took.
    """

    address: str
    config: RunConfig
    result: Result
    recorded: Mapping[str, Mapping[str, np.ndarray]]
    journal: Journal


def load_run(address: str | os.PathLike[str]) -> SavedRun:
    """Reads a run that `evaluate` has finished, or the demo.

    Raises:
        FileNotFoundError: there is no such run, or it is not finished.
        ValueError: one of its files is damaged.
        OSError: they cannot be read.
        ModuleNotFoundError: what reads them is not installed.
    """
    try:
        folder = open_folder(address)
    except FileExistsError as error:
        raise NotADirectoryError(
            f"{os.fspath(address)} is a file, not the folder of a run"
        ) from error
    config = read_config(folder)
    if config is None:
        # The folder of the demo holds its images and weights too.
        folder = open_folder(f"{folder.address}/{_DEMO}")
        config = read_config(folder)
    if config is None:
        raise FileNotFoundError(f"{os.fspath(address)} holds no run; give the --out of evaluate")
    try:
        part_size = int(config["batch_size"]) * int(config["batches_per_part"])
        int(config["label_offset"])  # which reports need, too
        names = [name for name in {k: dict(v) for k, v in config["data"].items()} if name != FIT]
        recorded = [str(name) for name in config.get("recorded", [])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder.address}/{CONFIG} is damaged; {_AGAIN}") from error
    metrics = folder.read(_METRICS)
    tables = {name: read_table(folder, name, part_size) for name in names}
    if metrics is None or None in tables.values():
        raise FileNotFoundError(
            f"{folder.address} holds a run that is not finished; run its own command again"
        )
    found = {name: table for name, table in tables.items() if table is not None}
    try:
        result = _to_result(json.loads(metrics), found)
        columns = {key: {n: table.scores[key] for n, table in found.items()} for key in recorded}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.address}/{_METRICS} is not that of its run ({type(error).__name__}); {_AGAIN}"
        ) from error
    return SavedRun(folder.address, config, result, columns, read_journal(folder))


def _to_result(content: dict[str, Any], tables: Mapping[str, ScoreTable]) -> Result:
    """The inverse of `report.to_dict`, whose tests are not made again."""
    excluded = {
        name: [
            Excluded(str(each["id"]), str(each["reason"]), int(each.get("position", -1)))
            for each in inputs
        ]
        for name, inputs in content["excluded"].items()
    }
    result = Result(
        tables={
            name: select_scores(table, content["metrics"])._replace(excluded=excluded[name])
            for name, table in tables.items()
        },
        metrics={
            detector: {name: _to_metrics(cells[name]) for name in tables if name != ID}
            for detector, cells in content["metrics"].items()
        },
        accuracy=None if content["accuracy"] is None else float(content["accuracy"]),
        not_run={name: str(why) for name, why in content["not_run"].items()},
        fit_excluded=excluded[FIT],
        warnings=[str(warning) for warning in content["warnings"]],
    )
    vars(result)["best"] = {
        name: {metric: _to_best(best) for metric, best in by_metric.items()}
        for name, by_metric in content["best"].items()
    }
    return result


def _to_metrics(content: Mapping[str, Any]) -> Metrics:
    return Metrics(**{name: Estimate(**_floats(estimate)) for name, estimate in content.items()})


def _to_best(content: Mapping[str, Any]) -> Best:
    against = {name: _floats(each) for name, each in content["against"].items()}
    adjusted = {name: each.pop("holm_p_value") for name, each in against.items()}
    comparisons = {name: Comparison(**each) for name, each in against.items()}
    return Best(str(content["detector"]), comparisons, adjusted)


def _floats(content: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in content.items()}
