"""The command that decides for images, one by one."""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TextIO

import numpy as np
import tyro

from gradnorm_jax.calibration.conformal import benjamini_hochberg, check_fdr
from gradnorm_jax.calibration.detector_file import load_detector
from gradnorm_jax.calibration.score_files import FileDecision, score_files
from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.progress import show_progress
from gradnorm_jax.text import printable, to_utf8

FOUND_OOD = 3
"""The status with --fail-on-ood if an image is out-of-distribution."""
UNUSABLE = os.EX_DATAERR
"""The status if an image could not be scored, whatever the others are: 65."""

Format = Literal["table", "jsonl", "csv"]
Write = Callable[[FileDecision], None]


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Decide for images whether they are in-distribution, with a file of `gradnorm-jax calibrate`.

    Each gets a line: its score (higher is more in-distribution), its p-value (low is
    out-of-distribution), the decision, the predicted class (the number of the largest logit), and
    its name. What cannot be read or decoded is named on stderr, and the others go on.

    Exit status: 0, all images have been scored; 65, some have not; with --fail-on-ood 3, all have
    been and at least one is out-of-distribution. 1 and 2: the command itself was wrong.

    Attributes:
        detector: the file.
        images: files, folders, or `-` for names from standard input, one on each line.
        format: a table, a JSON object on each line, or CSV.
        fail_on_ood: exit with status 3 if an image is out-of-distribution.
        fdr: decide for all images together, such that at most this fraction of those called
            out-of-distribution are not (Benjamini and Hochberg), in place of one by one. Lines come
            when all images are scored.
        weights: of the model, if they are not where they were.
        preprocess: where the detector's has no name that its file could tell, `my_module:object`.
        trust: modules whose code may be run because the file names it, such as that of your
            function that makes the model.
        batch_size: at most so many images at once on all devices.
        workers: how many images to decode at once; by default as many as there are CPUs.
    """

    detector: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[str, ...]]
    format: Format = "table"
    fail_on_ood: bool = False
    fdr: float | None = None
    weights: Path | None = None
    preprocess: str | None = None
    trust: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    batch_size: int = 64
    workers: int | None = None


def run_score(options: ScoreOptions) -> int:
    """Prints the decisions as they come; the exit status."""
    if not options.images:
        raise ValueError("no image is given: name files, folders, or - for names from stdin")
    if options.fdr is not None:
        check_fdr(options.fdr)
    calibrated = load_detector(
        options.detector,
        weights=options.weights,
        preprocess=options.preprocess,
        trust=options.trust,
    )
    results = score_files(
        calibrated,
        _names(options.images),
        batch_size=options.batch_size,
        workers=options.workers,
    )
    bad: list[Excluded] = []
    # Bars take sys.stdout for theirs, and lines on a terminal would be written over them.
    write = _WRITERS[options.format](sys.stdout)
    scored = found = 0
    with show_progress(False if sys.stdout.isatty() else None) as track:
        decisions = _usable(track(results, "images", None), bad)
        if options.fdr is not None:
            decisions = _together(decisions, options.fdr)
        for each in decisions:
            write(each)
            scored += 1
            found += each.is_ood
    if bad:
        total = scored + len(bad)
        print(f"gradnorm-jax: {len(bad)} of {total} images could not be scored", file=sys.stderr)
        return UNUSABLE
    return FOUND_OOD if found and options.fail_on_ood else 0


def _names(arguments: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument != "-":
            yield argument
            continue
        for line in sys.stdin.buffer:
            if name := line.rstrip(b"\r\n"):
                yield os.fsdecode(name)


def _usable(
    results: Iterable[FileDecision | Excluded], bad: list[Excluded]
) -> Iterator[FileDecision]:
    """The decisions; what could not be scored is named on stderr and put into `bad`."""
    for each in results:
        if isinstance(each, FileDecision):
            yield each
            continue
        bad.append(each)
        print(f"gradnorm-jax: {printable(each.id)}: {printable(each.reason)}", file=sys.stderr)


def _together(decisions: Iterable[FileDecision], fdr: float) -> Iterator[FileDecision]:
    listed = list(decisions)
    rejected = benjamini_hochberg(np.array([each.p_value for each in listed], np.float32), fdr)
    for each, is_ood in zip(listed, np.asarray(rejected), strict=True):
        yield each._replace(is_ood=bool(is_ood))


def _table(out: TextIO) -> Write:
    print(f"{'score':>12}  {'p-value':>9}  {'':3}  {'class':>5}  file", file=out)

    def write(row: FileDecision) -> None:
        verdict = "out" if row.is_ood else "in"
        print(
            f"{row.score:12.6g}  {row.p_value:9.3g}  {verdict:3}  {row.prediction:5}  "
            f"{printable(row.file)}",
            file=out,
            flush=True,
        )

    return write


def _jsonl(out: TextIO) -> Write:
    return lambda row: print(json.dumps(_fields(row, to_utf8(row.file))), file=out, flush=True)


def _csv(out: TextIO) -> Write:
    rows = csv.DictWriter(out, FileDecision._fields, lineterminator="\n")
    rows.writeheader()

    def write(row: FileDecision) -> None:
        rows.writerow(_fields(row, printable(row.file)))
        out.flush()

    return write


def _fields(row: FileDecision, file: str) -> dict[str, object]:
    # Nine digits tell any two float32 numbers apart.
    shortened = {"score": float(f"{row.score:.9g}"), "p_value": float(f"{row.p_value:.9g}")}
    return row._asdict() | {"file": file} | shortened


_WRITERS: dict[Format, Callable[[TextIO], Write]] = {
    "table": _table,
    "jsonl": _jsonl,
    "csv": _csv,
}
