"""A run from names and paths to a folder of results, which goes on where it was if it is killed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from gradnorm_jax.evaluation.cache import Cache, write_context
from gradnorm_jax.evaluation.evaluate import FIT, Evaluation, evaluate_feeds
from gradnorm_jax.evaluation.folder import Folder, lock, open_folder
from gradnorm_jax.evaluation.hosts import connect, wait_for_all
from gradnorm_jax.evaluation.inputs import open_inputs
from gradnorm_jax.evaluation.manifest import CONFIG, Manifest, claim
from gradnorm_jax.evaluation.options import EvaluateOptions
from gradnorm_jax.evaluation.passes import Execution, fitting_mesh
from gradnorm_jax.evaluation.peers import watched
from gradnorm_jax.evaluation.results import write_results
from gradnorm_jax.evaluation.scoring import Track, no_progress
from gradnorm_jax.evaluation.shards import in_folder

__all__ = ["EvaluateOptions", "run"]


def run(
    options: EvaluateOptions,
    track: Track[Any] = no_progress,
    stop_here: Callable[[], bool] = bool,
) -> Evaluation:
    """Runs an evaluation and leaves config, scores, figures and report in `options.out`.

    Everything that can be wrong with the options is found before the first image is scored. If the
    folder holds a part of the same run, only the rest is done; its files end up the same to the
    byte, provided the compiler picks the same kernels at each start, as it does for CPUs and TPUs.
    So a start with other options, another batch size, other versions, or other numbers of devices
    and processes is refused: with any of these the last digits of scores may change. The places of
    data sets, how parameters are shared between devices, and `max_bad` may differ.

    Several processes share the work; each returns the same evaluation, and the first writes the
    report. If one fails, all fail; see `peers`.

    Args:
        options: what to do.
        track: shows progress.
        stop_here: whether to stop after the present step, with everything saved; asked once per
            step, and once per table cell. See `hosts.preemption`.

    Raises:
        ValueError: an option is wrong, or a file damaged.
        OSError: a file cannot be read or written, the folder holds something else, another run is
            writing to it, or another process has failed.
        Interrupted: it was stopped, or another process is gone.
    """
    if options.distributed:
        connect(options.distributed)
    with watched():
        return _run(options, track, stop_here)


def _run(options: EvaluateOptions, track: Track[Any], stop_here: Callable[[], bool]) -> Evaluation:
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
                mesh=fitting_mesh(inputs.model, options.devices_per_copy),
                batch_size=options.batch_size,
                max_bad=options.max_bad,
                track=track,
                collect=in_folder(folder, cache, stop_here),
                stop_here=stop_here,
            ),
        )
        if jax.process_index() == 0:
            if cache:
                feeds = {FIT: inputs.fit, **inputs.feeds}
                ignored = {name: feed.ignored for name, feed in feeds.items() if feed}
                write_context(folder, inputs.model, ignored)
            write_results(folder, evaluation)
        wait_for_all()
    return evaluation


@contextlib.contextmanager
def _held(folder: Folder, manifest: Manifest) -> Iterator[None]:
    """Holds the folder for this run alone, the first process on behalf of all."""
    with contextlib.ExitStack() as stack:
        alone = False
        if jax.process_index() == 0:
            alone = stack.enter_context(lock(folder))
            claim(folder, manifest)
        wait_for_all()
        if jax.process_index():
            # The same folder, and the same run, as the first process sees?
            claim(folder, manifest)
        try:
            yield
        except Exception:
            # Nothing came of it: leave nothing in the way of another try. Where nothing is locked,
            # the config may be that of an equal run that has only started.
            if alone and folder.names() == [CONFIG]:
                folder.delete(CONFIG)
            raise
