"""Where the numbers of a report come from: configuration, versions, times, and what to cite."""

import collections
import re
from collections.abc import Mapping

from gradnorm_jax.detectors import DETECTORS
from gradnorm_jax.evaluation.journal import Journal
from gradnorm_jax.evaluation.records import FIT, count_positions
from gradnorm_jax.evaluation.run_config import flatten
from gradnorm_jax.evaluation.saved import SavedRun
from gradnorm_jax.evaluation.tables import Table
from gradnorm_jax.reporting.blocks import Block, Code, Listing, Section

_LISTED = 200
_PAPER = (
    "@inproceedings{huang2021gradnorm,",
    "  title     = {On the Importance of Gradients for Detecting Distributional Shifts in the",
    "               Wild},",
    "  author    = {Huang, Rui and Geng, Andrew and Li, Yixuan},",
    "  booktitle = {Advances in Neural Information Processing Systems},",
    "  volume    = {34},",
    "  year      = {2021}",
    "}",
)


def excluded(run: SavedRun) -> Section:
    """The inputs that could not be used."""
    by_set = {name: table.excluded for name, table in run.result.tables.items()}
    blocks: list[Block] = []
    for name, inputs in {**by_set, FIT: run.result.fit_excluded}.items():
        # Those that look like images and are not come first: they are the surprise.
        inputs = sorted(inputs, key=lambda each: each.position < 0)
        if inputs:
            rows = [[each.id, each.reason] for each in inputs[:_LISTED]]
            caption = f"{name}: {len(inputs)} files"
            if len(inputs) > _LISTED:
                caption += f", of which the first {_LISTED} are shown; metrics.json lists all"
            blocks.append(Table(["File", "Reason"], rows, names=2, caption=f"{caption}."))
    return Section("Excluded images", blocks or ["None."])


def configuration(run: SavedRun) -> Section:
    """What decided the results, and the versions of what computed them."""
    config = {key: value for key, value in run.config.items() if key != "versions"}
    facts = [[key, shown(value)] for key, value in flatten(config).items()]
    versions = [[name, str(version)] for name, version in run.config["versions"].items()]
    return Section(
        "Configuration",
        [
            Table(["Entry", "Value"], facts, names=2, caption=f"Of the run in {run.address}."),
            Table(["Package", "Version"], versions, names=2, caption="Versions."),
        ],
    )


def shown(value: object) -> str:
    """A value of a configuration."""
    return "none" if value in (None, {}, []) else str(value)


def timing(run: SavedRun) -> Section:
    """How long each pass took, all processes together."""
    seconds, batches = _totals(run.journal)
    if not seconds:
        return Section("Timing", ["Not recorded."])
    rows = []
    for name in seconds:
        count = _count(name, run)
        # A data set ends with a batch that is not full, and may be empty.
        whole = count is not None and batches[name] == count // int(run.config["batch_size"]) + 1
        rate = f"{count / seconds[name]:.1f}" if whole and count and seconds[name] else ""
        rows.append([name, "" if count is None else f"{count}", f"{seconds[name]:.1f}", rate])
    started = [session.started for session in run.journal.sessions]
    sentence = f"Started {started[0]}; times are of the wall clock, compilation included."
    if len(started) > 1:
        sentence += (
            f" Computed in {len(started)} sessions, the last of which started {started[-1]}."
        )
    return Section(
        "Timing",
        [sentence, Table(["Pass", "Inputs", "Seconds", "Inputs per second"], rows)],
    )


def _totals(journal: Journal) -> tuple[Mapping[str, float], Mapping[str, int]]:
    seconds: dict[str, float] = collections.defaultdict(float)
    batches: collections.Counter[str] = collections.Counter()
    for session in journal.sessions:
        for name, each in session.passes.items():
            seconds[name] += each.seconds
            batches[name] += each.batches
    return seconds, batches


def _count(name: str, run: SavedRun) -> int | None:
    """How many inputs a pass reads; None if that is not known, or it reads none."""
    if name in run.result.tables:
        return count_positions(run.result.tables[name])
    return run.config["data"].get(name, {}).get("inputs")


def citation(run: SavedRun) -> Section:
    """What to cite for the method, the detectors and this library."""
    papers = {detector: _papers(detector) for detector in run.result.metrics}
    version = str(run.config["versions"].get("gradnorm-jax", ""))
    software = (
        "@software{gradnorm_jax,",
        "  title   = {gradnorm_jax: out-of-distribution detection in gradient space},",
        f"  version = {{{version}}}",
        "}",
    )
    return Section(
        "How to cite",
        [
            "GradNorm and the layout of the first table:",
            Code(_PAPER),
            "The library that computed the numbers:",
            Code(software),
            "The detectors:",
            Listing([f"{detector}: {'; '.join(found)}" for detector, found in papers.items()]),
        ],
    )


def _papers(detector: str) -> list[str]:
    """Those of a detector and of its rectifiers, which are written before it."""
    names = re.sub(r"\(.*?\)", "", detector).split("+")
    return [DETECTORS[name].paper if name in DETECTORS else "your own" for name in names]
