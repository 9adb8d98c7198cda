"""The command that decides for images, one by one."""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from gradnorm_jax.calibration.conformal import benjamini_hochberg, check_fdr
from gradnorm_jax.calibration.score_files import FileDecision, score_files
from gradnorm_jax.cli.endings import FOUND, UNUSABLE, tell
from gradnorm_jax.cli.opening import Opened
from gradnorm_jax.cli.rows import Format, row_writer
from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.progress import show_progress


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Decide for images whether they are in-distribution, with a file of `gradnorm-jax calibrate`.

    Each gets a line: its score (higher is more in-distribution), its p-value (low is
    out-of-distribution), the decision, the predicted class (as labels are numbered), and its
    name. What cannot be read or decoded is named on stderr, and the others go on.

    Exit status: 0, all images have been scored; 65, some have not; with --fail-on-ood 3, all have
    been and at least one is out-of-distribution. 1 and 2: the command itself was wrong.

    Example: gradnorm-jax score gradnorm.safetensors photo.jpg folder_of_images --format jsonl

    Attributes:
        detector: the file of `gradnorm-jax calibrate`.
        images: files, folders, or `-` for names from standard input, one on each line.
        opening: how the file is read.
        format: a table, a JSON object on each line, or CSV.
        fail_on_ood: exit with status 3 if an image is out-of-distribution.
        fdr: decide for all images together, such that at most this fraction of those called
            out-of-distribution are not (Benjamini and Hochberg), in place of one by one. Lines come
            when all images are scored.
        batch_size: at most so many images at once on all devices.
        workers: how many images to decode at once; by default as many as there are CPUs.
    """

    detector: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DETECTOR_FILE")]
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
    opening: Opened
    format: Format = "table"
    fail_on_ood: bool = False
    fdr: float | None = None
    batch_size: int = 64
    workers: int | None = None


def run_score(options: ScoreOptions) -> int:
    """Prints the decisions as they come; the exit status."""
    if not options.images:
        raise ValueError("no image is given: name files, folders, or - for names from stdin")
    if options.fdr is not None:
        check_fdr(options.fdr)
    calibrated = options.opening.load(options.detector)
    results = score_files(
        calibrated,
        _names(options.images),
        batch_size=options.batch_size,
        workers=options.workers,
    )
    bad: list[Excluded] = []
    # Bars take sys.stdout for theirs, and lines on a terminal would be written over them.
    write = row_writer(options.format, sys.stdout, FileDecision._fields)
    scored = found = 0
    with show_progress(False if sys.stdout.isatty() else None) as track:
        decisions = _usable(track(results, "images", None), bad)
        if options.fdr is not None:
            decisions = _together(decisions, options.fdr)
        for each in decisions:
            write(each._asdict())
            scored += 1
            found += each.is_ood
    if bad:
        total = scored + len(bad)
        tell(f"{len(bad)} of {total} images could not be scored")
        return UNUSABLE
    return FOUND if found and options.fail_on_ood else 0


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
        tell_excluded(each)


def tell_excluded(each: Excluded) -> None:
    """Names what cannot be used, and why, on stderr."""
    tell(f"{each.id}: {each.reason}")


def _together(decisions: Iterable[FileDecision], fdr: float) -> Iterator[FileDecision]:
    listed = list(decisions)
    rejected = benjamini_hochberg(np.array([each.p_value for each in listed], np.float32), fdr)
    for each, is_ood in zip(listed, np.asarray(rejected), strict=True):
        yield each._replace(is_ood=bool(is_ood))
