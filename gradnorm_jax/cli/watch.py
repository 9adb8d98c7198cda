"""The command that watches a folder for images that no longer look in-distribution."""

import dataclasses
import hashlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

import tyro

from gradnorm_jax.calibration.drift import DriftState, init_drift, update_drift
from gradnorm_jax.calibration.score_files import FileDecision, FileScorer, file_scorer
from gradnorm_jax.cli.endings import FOUND, UNUSABLE, tell
from gradnorm_jax.cli.opening import Opened
from gradnorm_jax.cli.rows import Format, row_writer
from gradnorm_jax.cli.score import tell_excluded
from gradnorm_jax.cli.score_log import ScoreLog, open_log
from gradnorm_jax.data.arrivals import arrivals
from gradnorm_jax.data.stream import Excluded

_FIELDS = ("number", *FileDecision._fields, "drift_p_value")


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """Watch a folder for images as they arrive, and tell when they are no longer in-distribution.

    Each gets a line as of `gradnorm-jax score`, with its number and drift-p: the p-value of the
    assumption that all images so far come from where the calibration images came from, in no
    particular order. Once it is at most --alpha, that is rejected, and told on stderr. The
    probability that this ever happens to in-distribution images is at most --alpha, however many
    they are.

    Images are taken once, in the order in which they arrived (time of modification, then name), and
    only when they no longer change. What cannot be decoded is named on stderr, left out, and tried
    again if it changes.

    Exit status: 0, done; 65, some images could not be scored; 3 with --fail-on-drift, rejected.

    Example: gradnorm-jax watch gradnorm.safetensors incoming --log incoming.log --fail-on-drift

    Attributes:
        detector: the file of `gradnorm-jax calibrate`.
        folder: where images arrive, in subfolders too.
        opening: how the file is read.
        alpha: the probability of a false alarm, ever.
        fail_on_drift: end with status 3 as soon as the assumption is rejected.
        once: end after the images that are there.
        idle_seconds: end when no image has come for so long; by default only Ctrl-C ends.
        log: keep the scores in this file, and go on where it ends if it is there already.
        interval: seconds between two looks into the folder.
        format: a table, a JSON object on each line, or CSV.
        seed: of the random numbers that break ties between scores.
        batch_size: at most so many images at once on all devices.
        workers: how many images to decode at once; by default as many as there are CPUs.
    """

    detector: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DETECTOR_FILE")]
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    opening: Opened
    alpha: float = 0.01
    fail_on_drift: bool = False
    once: bool = False
    idle_seconds: float | None = None
    log: Path | None = None
    interval: float = 1.0
    format: Format = "table"
    seed: int = 0
    batch_size: int = 64
    workers: int | None = None


def run_watch(options: WatchOptions) -> int:
    """Prints the decisions as images arrive; the exit status."""
    if not 0 < options.alpha < 1:
        raise ValueError(f"alpha must be above 0 and below 1, got {options.alpha}")
    calibrated = options.opening.load(options.detector)
    score = file_scorer(calibrated, batch_size=options.batch_size, workers=options.workers)
    facts = {"detector": _hash_file(options.detector), "seed": options.seed}
    with open_log(options.log, facts) as log:
        return _watch(options, score, init_drift(calibrated.calibration_scores, options.seed), log)


def _watch(options: WatchOptions, score: FileScorer, state: DriftState, log: ScoreLog) -> int:
    write = row_writer(options.format, sys.stdout, _FIELDS)
    state, drift = update_drift(state, log.scores)
    done, bad = set(log.files), set[str]()
    if is_rejected := bool((drift.p_value <= options.alpha).any()):
        first = int((drift.p_value <= options.alpha).argmax())
        _tell_rejection(options, first + 1, log.files[first])
        if options.fail_on_drift:
            return FOUND
    for name, each in _results(options, score, done):
        if isinstance(each, Excluded):
            bad.add(name)
            tell_excluded(each)
            continue
        done.add(name)
        bad.discard(name)
        log.add(name, each.score)
        state, drift = update_drift(state, [each.score])
        number, p_value = state.martingale.seen, float(drift.p_value[0])
        write({"number": number, **each._asdict(), "drift_p_value": p_value})
        if p_value <= options.alpha and not is_rejected:
            is_rejected = True
            _tell_rejection(options, number, name)
            if options.fail_on_drift:
                return FOUND
    count = state.martingale.seen
    if not is_rejected:
        tell(f"{count} images: the in-distribution assumption stands at {_level(options.alpha)}")
    if bad:
        tell(f"{len(bad)} of {count + len(bad)} images could not be scored")
        return UNUSABLE
    return 0


def _results(
    options: WatchOptions, score: FileScorer, done: Collection[str]
) -> Iterator[tuple[str, FileDecision | Excluded]]:
    """What is said of each image that arrives, with its path in the folder."""
    found = arrivals(
        options.folder,
        done,
        interval=options.interval,
        once=options.once,
        idle_seconds=options.idle_seconds,
    )
    for names in found:
        for each in score(str(options.folder / name) for name in names):
            path = each.file if isinstance(each, FileDecision) else each.id
            yield Path(path).relative_to(options.folder).as_posix(), each


def _tell_rejection(options: WatchOptions, number: int, name: str) -> None:
    tell(
        f"the in-distribution assumption is rejected at {_level(options.alpha)} since image "
        f"{number} ({options.folder / name})"
    )


def _level(alpha: float) -> str:
    return f"{100 * alpha:.10g} %"


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
