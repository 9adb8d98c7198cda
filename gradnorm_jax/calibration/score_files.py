"""What a calibrated detector says of image files, one by one, as they come."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from gradnorm_jax.calibration.calibrated import Calibrated
from gradnorm_jax.data.named_files import File, expand_folders, image_batches
from gradnorm_jax.data.preprocess import Preprocess
from gradnorm_jax.data.source_stream import available_cpus
from gradnorm_jax.data.stream import Excluded, HostBatch
from gradnorm_jax.evaluation.checks import check_parameters
from gradnorm_jax.evaluation.loop import one_ahead
from gradnorm_jax.evaluation.step import Scored, place_model, put_batch, put_states, score_batch

_NOT_FINITE = "the network's features or logits, or its score, are not finite"


class FileDecision(NamedTuple):
    """What is said of one image.

    Attributes:
        file: its name.
        score: higher is more in-distribution.
        p_value: see `conformal_p_values`.
        is_ood: whether the score is below the threshold.
        prediction: the predicted class; see `Decision`.
    """

    file: str
    score: float
    p_value: float
    is_ood: bool
    prediction: int


FileScorer = Callable[[Iterable[str]], Iterator[FileDecision | Excluded]]
"""Decides for image files; see `score_files`."""


def score_files(
    calibrated: Calibrated,
    names: Iterable[str],
    *,
    batch_size: int = 64,
    workers: int | None = None,
) -> Iterator[FileDecision | Excluded]:
    """Decides for image files, on all devices, while their names still come.

    Args:
        calibrated: the detector.
        names: of files, and of folders, whose images take their place.
        batch_size: at most so many images at once.
        workers: how many images to decode at once; by default as many as there are CPUs.

    Yields:
        Decisions in the order of the names; `Excluded` with a reason for what cannot be scored,
        before the decisions of the batch that it was in.

    Raises:
        ValueError: the detector has no `Preprocess` for image files, or an option is out of range.
    """
    return file_scorer(calibrated, batch_size=batch_size, workers=workers)(names)


def file_scorer(
    calibrated: Calibrated, *, batch_size: int = 64, workers: int | None = None
) -> FileScorer:
    """`score_files` with the model put on the devices once, for names that come again and again."""
    preprocess = calibrated.preprocess
    if not isinstance(preprocess, Preprocess):
        raise ValueError("image files need a Preprocess, and the detector was calibrated without")
    if batch_size < 1 or (workers is not None and workers < 1):
        raise ValueError(f"batch_size and workers must be at least 1: {batch_size}, {workers}")
    check_parameters(calibrated.fitted.model)
    detector = calibrated.fitted.detector
    model, placement = place_model(calibrated.fitted.model)
    states = put_states({detector.name: calibrated.fitted.state}, placement)

    def start(batch: HostBatch) -> tuple[HostBatch, Scored]:
        data = put_batch(batch.data, placement)
        scored = score_batch(
            model,
            states,
            data,
            detectors=(detector,),
            preprocess=preprocess,
            placement=placement,
        )
        return batch._replace(data=None), scored

    def score(names: Iterable[str]) -> Iterator[FileDecision | Excluded]:
        files = expand_folders(names)
        first: list[File] = list(itertools.islice(files, batch_size))
        # A few images make a small batch, of one of few sizes, each of which is compiled once.
        few = 1 << max(len(first) - 1, 0).bit_length()
        devices = placement.mesh.size
        size = -(-min(batch_size, few) // devices) * devices
        batches = image_batches(
            itertools.chain(first, files), preprocess, size, workers or available_cpus()
        )
        for batch, scored in one_ahead(map(start, batches)):
            yield from batch.excluded
            yield from _decisions(calibrated, batch, scored)

    return score


def _decisions(
    calibrated: Calibrated, batch: HostBatch, scored: Scored
) -> Iterator[FileDecision | Excluded]:
    (scores,) = scored.scores.values()
    scores, finite, prediction = jax.device_get((scores, scored.finite, scored.predictions))
    p_values, is_ood = jax.device_get(calibrated.judge(scores))
    for row, file in zip(np.flatnonzero(batch.mask), batch.ids, strict=True):
        if finite[row] and np.isfinite(scores[row]):
            yield FileDecision(
                file,
                float(scores[row]),
                float(p_values[row]),
                bool(is_ood[row]),
                int(prediction[row]) - calibrated.label_offset,
            )
        else:
            yield Excluded(file, _NOT_FINITE)
