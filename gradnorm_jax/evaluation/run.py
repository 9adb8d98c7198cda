"""A run from names and paths to a folder of results, which goes on where it was if it is killed."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gradnorm_jax.evaluation.cache import Cache, write_head
from gradnorm_jax.evaluation.evaluate import Evaluation, evaluate_feeds
from gradnorm_jax.evaluation.folder import Folder, lock, open_folder
from gradnorm_jax.evaluation.hosts import connect, shared_fate
from gradnorm_jax.evaluation.inputs import open_inputs
from gradnorm_jax.evaluation.manifest import CONFIG, Manifest, claim
from gradnorm_jax.evaluation.options import EvaluateOptions
from gradnorm_jax.evaluation.passes import Execution
from gradnorm_jax.evaluation.results import write_results
from gradnorm_jax.evaluation.scoring import Track, no_progress
from gradnorm_jax.evaluation.shards import in_folder

__all__ = ["EvaluateOptions", "new_folder", "run"]


def run(
    options: EvaluateOptions,
    track: Track[Any] = no_progress,
    stop_here: Callable[[], bool] = bool,
) -> Evaluation:
    """Runs an evaluation and leaves config, scores, figures and report in `options.out`.

    Everything that can be wrong with the options is found before the first image is scored. If the
    folder holds a part of the same run, only the rest is done; its files end up the same to the
    byte, provided the compiler picks the same kernels at each start, as it does for CPUs and TPUs.
    Several processes share the work; each returns the same evaluation, and the first writes the
    report.

    Args:
        options: what to do.
        track: shows progress.
        stop_here: whether to stop after the present step, with everything saved; asked once per
            step. See `hosts.preemption`.

    Raises:
        ValueError: an option is wrong, or a file damaged.
        OSError: a file cannot be read or written, the folder holds something else, or another run
            is writing to it.
        Interrupted: it was stopped.
    """
    if options.distributed:
        connect(options.distributed)
    inputs = open_inputs(options)
    folder = open_folder(options.out)
    with _held(folder, inputs.manifest):
        cache = Cache(folder, options.cache) if options.cache else None
        evaluation = evaluate_feeds(
            inputs.model,
            inputs.feeds,
            inputs.detectors,
            fit=inputs.fit,
            label_offset=inputs.label_offset,
            not_run=inputs.not_run,
            execution=Execution(
                batch_size=options.batch_size,
                max_bad=options.max_bad,
                track=track,
                collect=in_folder(folder, cache, stop_here),
            ),
        )
        with shared_fate():
            if jax.process_index() == 0:
                if cache:
                    write_head(folder, inputs.model)
                write_results(folder, evaluation)
    return evaluation


@contextlib.contextmanager
def _held(folder: Folder, manifest: Manifest) -> Iterator[None]:
    """Holds the folder for this run alone, the first process on behalf of all."""
    with contextlib.ExitStack() as stack:
        with shared_fate():
            if jax.process_index() == 0:
                stack.enter_context(lock(folder))
                claim(folder, manifest)
        with shared_fate():
            claim(folder, manifest)
        try:
            yield
        except Exception:
            # Nothing came of it: leave nothing in the way of another try.
            if jax.process_index() == 0 and folder.names() == [CONFIG]:
                folder.delete(CONFIG)
            raise


def new_folder(path: Path) -> Path:
    """Makes the folder of a run; FileExistsError if there is something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists and is not empty; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path
