"""Single passes that keep what comes of them in memory: what detectors learn, and scores."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.preprocess import Prepare, get_preprocess
from gradnorm_jax.data.schedule import make_schedule
from gradnorm_jax.data.stream import DataStream
from gradnorm_jax.detectors import Detector
from gradnorm_jax.evaluation.checks import check_limits, check_options, check_parameters
from gradnorm_jax.evaluation.fitting import fit_data
from gradnorm_jax.evaluation.loop import Execution, Run, score_data
from gradnorm_jax.evaluation.records import FIT, ScoreTable
from gradnorm_jax.evaluation.step import States, place_model
from gradnorm_jax.progress import Track, show_progress
from gradnorm_jax.types import Model


def fit_states(
    model: Model,
    data: Any,
    detectors: Sequence[Detector],
    *,
    preprocess: Prepare | str = None,
    batch_size: int = 64,
    progress: bool | Track | None = None,
) -> States:
    """What detectors learn from training data, by their names, in memory; see `evaluate`."""
    prepare = get_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    stream = as_stream(data, prepare, name=FIT)
    with _in_memory(model, stream, prepare, batch_size, progress) as run:
        learned = fit_data(run, stream, detectors)
    for remark in learned.remarks:
        logging.getLogger(__name__).warning(remark)
    return learned.states


def score_set(
    name: str,
    model: Model,
    stream: DataStream,
    detector: Detector,
    state: Any,
    *,
    preprocess: Prepare = None,
    batch_size: int = 64,
    max_undecodable: float = 0.01,
    progress: bool | Track | None = None,
) -> ScoreTable:
    """The scores of one data set by one detector, in memory; see `evaluate`."""
    check_options([detector], model)
    with _in_memory(model, stream, preprocess, batch_size, progress, max_undecodable) as run:
        table = score_data(run, name, stream, {detector.name: state}, (detector,))
    assert table is not None  # there is no other process
    return table


@contextlib.contextmanager
def _in_memory(
    model: Model,
    stream: DataStream,
    preprocess: Prepare,
    batch_size: int,
    progress: bool | Track | None,
    max_undecodable: float = 0.01,
) -> Iterator[Run]:
    check_limits(batch_size, max_undecodable)
    check_parameters(model)
    placed, placement = place_model(model)
    schedule = make_schedule(batch_size, placement.mesh.size, [stream.length])
    with show_progress(progress) as track:
        yield Run(placed, Execution(placement, schedule, preprocess, max_undecodable, track))
