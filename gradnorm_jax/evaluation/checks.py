"""What is checked before any work is done, and what to be wary of after it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.stream import UNKNOWN, DataStream
from gradnorm_jax.detectors import Detector, gradient, network_passes
from gradnorm_jax.evaluation.records import FIT, ID, ScoreTable
from gradnorm_jax.tree import listing, non_finite, selected_paths
from gradnorm_jax.types import Model, head_parameters


def check_set_names(data: Mapping[str, Any]) -> None:
    """Raises ValueError if there is no OOD set, or one whose name cannot be that of its files."""
    if not isinstance(data, Mapping):
        raise ValueError(f"ood_data must be {{name: data}}, got a {type(data).__name__}")
    if not data:
        raise ValueError("no OOD set is given; give at least one, as {name: data}")
    seen = {FIT, ID.lower()}
    for name in data:
        if (
            not isinstance(name, str)
            or not name.replace("_", "").replace("-", "").replace(".", "").isalnum()
        ):
            raise ValueError(
                f"OOD set name {name!r} cannot be that of a file; use letters, digits, . _ and -"
            )
        if len(name) > 100:
            raise ValueError(f"OOD set name {name[:20]!r}... is too long; use at most 100 letters")
        if name.lower() in seen:
            raise ValueError(f"OOD set name {name!r} is taken; give each set a name of its own")
        seen.add(name.lower())


def check_limits(batch_size: int, max_undecodable: float) -> None:
    """Raises ValueError if a number is out of its range."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= max_undecodable <= 1:
        raise ValueError(f"max_undecodable is a fraction from 0 to 1, got {max_undecodable}")


def check_sharing(
    process: tuple[int, int], wait_seconds: float, out: Any, cache: str | None
) -> None:
    """Raises ValueError if processes cannot share a run so, or nothing can be kept in memory."""
    if not 0 <= process[0] < process[1]:
        raise ValueError(
            f"process must be (i, n) with 0 <= i < n, got {process}: number processes from 0"
        )
    if not wait_seconds >= 0:
        raise ValueError(f"wait_seconds must be at least 0, got {wait_seconds}")
    if out is None and (process[1] > 1 or cache):
        what = "several processes" if process[1] > 1 else "a cache"
        raise ValueError(f"{what} cannot share results kept in memory: give a folder (out)")


def check_parameters(model: Model) -> None:
    """Raises ValueError that names the parameters in which a number is not finite.

    Of other arrays, such as batch statistics and masks, none may be NaN.
    """
    bad = [*non_finite(model.params), *non_finite(model.state, allow_infinity=True)]
    if bad:
        raise ValueError(
            f"the model's arrays hold numbers that are not finite: {listing(bad)}; training has "
            "diverged, or they were loaded from a damaged file"
        )


def check_options(detectors: Sequence[Detector], model: Model) -> None:
    """Raises ValueError if GradNorm, a reading or a pass asks for parameters that are not there."""
    without_bias = model.head is not None and model.head.bias is None
    for detector in detectors:
        options = dict(detector.options)
        is_gradnorm = detector.score_fn.__module__ == gradient.__name__
        if is_gradnorm and without_bias and options.get("include_bias"):
            raise ValueError(
                f"{detector.name}: the model's last layer has no bias; leave out include_bias"
            )
        reading = options.get("reading")
        parts = [*network_passes(detector), *([] if reading is None else [reading])]
        for asked in (dict(part.options) for part in parts):
            try:
                if "select" in asked:
                    selected_paths(model.params, asked["select"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{detector.name}: {error}") from error


def cannot_run(
    detectors: Sequence[Detector], model: Model, fit: DataStream | None
) -> dict[str, str]:
    """Why detectors have to be left out, by their names.

    Args:
        detectors: all that are asked for.
        model: the network.
        fit: the training data; None if there are none.
    """
    reasons = {}
    for d in detectors:
        if d.fit and fit is None:
            reasons[d.name] = "it is fitted to ID training data, and none are given (fit)"
        elif d.needs == "outputs" and model.head is None:
            reasons[d.name] = "it needs features, and the model has no linear last layer"
    needy = [d.name for d in detectors if d.optional and d.fit and d.fit.needs_labels]
    if needy and fit is not None and not _is_labelled(fit):
        reasons |= dict.fromkeys(needy, "it learns from labels, and the training data have none")
    return reasons


def _is_labelled(stream: DataStream) -> bool:
    """Whether the first input of a data set has a label."""
    batches = stream.batches(BatchSchedule(batch_size=1))
    labels = next((batch.labels for batch in batches if batch.labels.size), [UNKNOWN])
    return bool(labels[0] != UNKNOWN)


def same_data(streams: Mapping[str, DataStream]) -> list[str]:
    """A sentence on each two data sets that are the same."""
    found = []
    for (name, stream), (other, its) in itertools.combinations(streams.items(), 2):
        # Nothing is hashed in vain, and a loader has no content that could be compared.
        if stream.length is not None and stream.length == its.length:
            identity = stream.identity()
            if "sha256" in identity and identity == its.identity():
                found.append(f"{name} and {other} are the same data.")
    return found


def find_accuracy(
    table: ScoreTable, model: Model, label_offset: int, folders: int | None
) -> tuple[float | None, list[str]]:
    """Top-1 accuracy on the rows with a known label, and a sentence if it is unknown or doubtful.

    Label k is logit k + `label_offset`. The accuracy is unknown (None) if a label is none of the
    network's classes, or if labels are positions of class folders and the network has another
    number of classes: then they are not numbered alike.

    Args:
        table: the scored ID inputs.
        model: the network.
        label_offset: the logit of class 0.
        folders: how many class folders the labels are positions of; None if they are given.
    """
    known = table.labels >= 0
    if not known.any():
        return None, []
    largest = int(table.labels.max())
    classes = None
    if model.head is not None:
        classes = jax.eval_shape(head_parameters, model)[0].shape[-1] - label_offset
    if folders is not None and folders != classes:
        number = "an unknown number of" if classes is None else classes
        return None, [
            f"The accuracy is unknown: {ID} has {folders} class folders and the network {number} "
            "classes, so their order does not tell which is which; give labels in a CSV file."
        ]
    if classes is not None and largest >= classes:
        return None, [
            f"The accuracy is unknown: {ID} has labels up to {largest}, and the network's classes "
            f"are 0 to {classes - 1}."
        ]
    accuracy = np.mean(table.predictions[known] == table.labels[known] + label_offset)
    if classes is not None and largest + 1 < classes:
        return float(accuracy), [
            f"The labels of {ID} go up to {largest} and the network's classes to {classes - 1}: "
            "the accuracy is right if both are numbered alike."
        ]
    return float(accuracy), []
