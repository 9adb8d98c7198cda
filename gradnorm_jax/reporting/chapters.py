"""What a report says of a run, and of several side by side."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gradnorm_jax.evaluation.records import ID
from gradnorm_jax.evaluation.result import data_sets, remarks
from gradnorm_jax.evaluation.run_config import flatten
from gradnorm_jax.evaluation.saved import SavedRun
from gradnorm_jax.evaluation.tables import LEGEND, Cells, Table, full_table, grouped_table
from gradnorm_jax.metrics import Comparison, threshold_at_tpr
from gradnorm_jax.reporting import background
from gradnorm_jax.reporting.blocks import Block, Chapter, Charts, Gallery, Listing, Section
from gradnorm_jax.reporting.charts import POINTS, histogram, roc, scatter
from gradnorm_jax.reporting.pictures import OpenImages, image_opener, most_wrong, picture
from gradnorm_jax.reporting.side_by_side import (
    TESTED,
    Difference,
    Runs,
    common_sets,
    differences,
    leaders,
    match_inputs,
)

_CAPTION = (
    "In percent. FPR95 is the fraction of OOD inputs that pass as ID where 95 % of ID inputs do, "
    "AUPR takes ID as the positive class; higher scores mean more in-distribution."
)
_INTERVALS = (
    "In percent, with 95 % intervals (bootstrap for FPR95, the jackknife's variance for the "
    "others, which is DeLong's for AUROC). The field uses the name FPR95 for two numbers: with ID "
    "as the positive class, the paper's, it is the fraction of OOD inputs above the score that "
    "95 % of ID inputs reach; with OOD as the positive class, OpenOOD's, that of ID inputs below "
    "the score under which 95 % of OOD inputs are."
)
_CHARTS = (
    "Histograms are fractions of each set; the dashed line is the threshold that 95 % of ID pass. "
    "Bands around ROC curves hold each point with a confidence of 95 % (Clopper and Pearson's "
    "intervals of both rates). Confidence is the largest softmax probability. Scatter plots show "
    f"at most {POINTS} inputs of each set, drawn by lot. Half a percent of a set at either end may "
    "lie beyond an axis; it is drawn at its end."
)
_FACTORS = (
    "GradNorm is the product of U, the 1-norm of the features, and V, the 1-norm of softmax less "
    "the uniform distribution. The dashed line is where it is as large as 95 % of ID reach."
)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What to show.

    Attributes:
        pictures: how many images of each set.
        detector: whose mistakes they are; gradnorm if that was run, or else the first.
        sources: where images are, by data set, if not where they were.
        data_dir: where `tfds:` finds prepared data sets.
        drawn: whether there are charts and images.
    """

    pictures: int = 12
    detector: str | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data_dir: str | os.PathLike[str] | None = None
    drawn: bool = True


def all_chapters(runs: Runs, choices: Choices) -> Iterator[Chapter]:
    """One for each run, after one for all of them if there are several."""
    if len(runs) > 1:
        yield Chapter("Runs side by side", list(_compared(runs)))
    for name, run in runs.items():
        yield Chapter(name, list(_sections(run, choices)))


def _sections(run: SavedRun, choices: Choices) -> Iterator[Section]:
    yield _results(run)
    if choices.pictures:
        yield _pictures(run, choices)
    if choices.drawn:
        yield Section("Scores", [_CHARTS, *_charts(run)])
        yield Section("Factors of GradNorm", _factors(run))
    yield Section("All metrics", [_INTERVALS, full_table(run.result.metrics)], for_papers=True)
    yield background.excluded(run)
    yield background.timing(run)
    yield background.configuration(run)
    yield background.citation(run)


def _results(run: SavedRun) -> Section:
    result = run.result
    best = {
        (name, metric): {(detector,) for detector in each.leaders()}
        for name, by_metric in result.best.items()
        for metric, each in by_metric.items()
    }
    cells: Cells = {(detector,): by_set for detector, by_set in result.metrics.items()}
    caption = f"{_CAPTION} In bold: {LEGEND}" if best else _CAPTION
    blocks: list[Block] = [grouped_table(cells, best, ["Detector"], caption)]
    blocks += [Listing([*data_sets(result), *remarks(result)])]
    return Section("Results", blocks, for_papers=True)


def _pictures(run: SavedRun, choices: Choices) -> Section:
    detectors = run.result.metrics
    detector = choices.detector or (
        "gradnorm" if "gradnorm" in detectors else next(iter(detectors))
    )
    if detector not in detectors:
        raise ValueError(
            f"no scores of {detector!r} in {run.address}; detectors: {', '.join(detectors)}"
        )
    opener = image_opener({**run.journal.sources, **choices.sources}, choices.data_dir)
    names = [name for name in run.result.tables if name != ID]
    return Section(
        f"What {detector} is most wrong about",
        [_gallery(run, name, detector, opener, choices) for name in [*names, ID]],
    )


def _gallery(
    run: SavedRun, name: str, detector: str, open_images: OpenImages, choices: Choices
) -> Gallery:
    table = run.result.tables[name]
    confidence = run.recorded.get("msp", {}).get(name)
    source = open_images(name) if choices.drawn else ""
    pictures = []
    # Class k is logit k + label_offset.
    classes = table.predictions - int(run.config["label_offset"])
    for row in most_wrong(table, name, detector, choices.pictures):
        facts = [f"score {table.scores[detector][row]:.4g}", f"class {classes[row]}"]
        if confidence is not None:
            facts[-1] += f", {100 * confidence[row]:.1f} %"
        if name == ID and table.labels[row] >= 0:
            facts.append(f"label {table.labels[row]}")
        pictures.append(picture(source, table, row, facts))
    kind = "The most OOD-like of ID" if name == ID else f"The most ID-like of {name}"
    return Gallery(kind, pictures, source if isinstance(source, str) else "")


def _charts(run: SavedRun) -> Iterator[Charts]:
    confidence = run.recorded.get("msp")
    for detector, cells in run.result.metrics.items():
        scores = {name: table.scores[detector] for name, table in run.result.tables.items()}
        aurocs = {name: cell.auroc for name, cell in cells.items()}
        charts = [histogram(detector, scores, name, auroc.value) for name, auroc in aurocs.items()]
        charts.append(roc(detector, scores, aurocs))
        if confidence is not None and detector != "msp":
            title = f"{detector} against confidence"
            charts.append(scatter(title, confidence, scores, ("confidence", "score")))
        yield Charts(detector, charts)


def _factors(run: SavedRun) -> list[Block]:
    u, v = (run.recorded.get(name) for name in ("feature_norm", "residual_norm"))
    if u is None or v is None:
        return ["Not recorded: the model has no last layer that is known, or the run is older."]
    threshold = threshold_at_tpr(u[ID].astype(np.float64) * v[ID])
    return [_FACTORS, Charts("", [scatter("U against V", u, v, ("U", "V"), threshold)])]


def _compared(runs: Runs) -> Iterator[Section]:
    orders, doubts = match_inputs(runs)
    said = [Listing(doubts)] if doubts else []
    sets = common_sets(runs)
    if sets:
        cells: Cells = {
            (name, detector): {each: by_set[each] for each in sets}
            for name, run in runs.items()
            for detector, by_set in run.result.metrics.items()
        }
        best = leaders(runs, orders)
        caption = f"{_CAPTION} In bold: {LEGEND}" if best else _CAPTION
        table = grouped_table(cells, best, ["Run", "Detector"], caption)
        yield Section("Results", [table, *said], for_papers=True)
        yield Section("Paired tests", _tests(runs, differences(runs, orders)), for_papers=True)
    else:
        yield Section("Results", ["The runs have no OOD set in common.", *said])
    yield Section("What differs", [_what_differs(runs)])


def _tests(runs: Runs, found: Sequence[Difference]) -> list[Block]:
    first = next(iter(runs))
    if not found:
        return [f"No run shares a detector and the inputs with {first}."]
    by_cell: dict[tuple[str, str, str], list[str]] = {}
    for each in found:
        cells = by_cell.setdefault((each.run, each.detector, each.ood_set), [])
        cells += [_points(each.comparison), f"{each.holm_p_value:.2g}"]
    header = [text for metric in TESTED for text in (metric, "p")]
    return [
        Table(
            ["Run", "Detector", "OOD set", *header],
            [[*names, *cells] for names, cells in by_cell.items()],
            names=3,
            caption=f"By how many percentage points each run exceeds {first}, with 95 % intervals, "
            "and p-values of paired tests on the same inputs, after Holm's correction for all "
            "tests of a column.",
        )
    ]


def _points(comparison: Comparison) -> str:
    low, high = 100 * comparison.low, 100 * comparison.high
    return f"{100 * comparison.difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def _what_differs(runs: Runs) -> Block:
    flat = {name: flatten(run.config) for name, run in runs.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows = [[key, *(background.shown(config.get(key)) for config in flat.values())] for key in keys]
    differing = [[key, *values] for key, *values in rows if len(set(values)) > 1]
    if not differing:
        return "Nothing: the runs have the same configuration."
    return Table(["Entry", *runs], differing, names=1 + len(runs))
