"""A detector that decides: fitted to training data, calibrated on held-out data."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax.calibration.conformal import (
    conformal_p_values,
    threshold_at_tpr,
    threshold_rank,
    tpr_interval,
)
from gradnorm_jax.data.preprocess import Prepare, get_preprocess, to_network_input
from gradnorm_jax.detectors import Batch, Detector
from gradnorm_jax.fitted import Fitted
from gradnorm_jax.fitted import fit as fit_detector
from gradnorm_jax.metrics.intervals import Estimate
from gradnorm_jax.numerics import to_common_float
from gradnorm_jax.types import Model

CALIBRATION = "calibration"
"""What messages call the held-out data."""


class Decision(NamedTuple):
    """What a calibrated detector says of a batch.

    Attributes:
        score: `[B]`, higher is more in-distribution.
        p_value: `[B]`, see `conformal_p_values`; low is out-of-distribution.
        is_ood: `[B]` bool.
        prediction: `[B]` int32, the class with the largest logit, numbered as labels are; -1 if
            it is a logit before those of the classes ("background" in some networks).
    """

    score: jax.Array
    p_value: jax.Array
    is_ood: jax.Array
    prediction: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A detector with its model, and what it scores on held-out in-distribution (ID) data.

    A pytree, so `jax.jit` takes it as argument. Its functions take inputs as `calibrate` was given
    them: of what makes the network's input, they do what is done on the device. uint8 images for a
    `Preprocess` must have its size already.

    Attributes:
        fitted: the detector.
        calibration_scores: `[n]`, ascending.
        threshold: the score from which on an input counts as ID.
        tpr: the fraction of ID inputs that shall reach it.
        confidence: of `tpr_interval`, and of the threshold if it is `confident`.
        confident: whether `tpr` holds with this confidence, or else on average over calibration
            sets; see `threshold_at_tpr`.
        preprocess: what makes the network's input.
        label_offset: class k is logit k + label_offset.
    """

    fitted: Fitted
    calibration_scores: jax.Array
    threshold: jax.Array
    tpr: float = dataclasses.field(metadata={"static": True})
    confidence: float = dataclasses.field(metadata={"static": True})
    confident: bool = dataclasses.field(metadata={"static": True})
    preprocess: Prepare = dataclasses.field(default=None, metadata={"static": True})
    label_offset: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def tpr_interval(self) -> Estimate:
        """The true positive rate of the threshold with its interval; see `tpr_interval`."""
        count = self.calibration_scores.size
        rank = threshold_rank(count, self.tpr, self.confidence if self.confident else None)
        return tpr_interval(count + 1 - rank, count, self.confidence)

    def score(self, images: jax.Array) -> jax.Array:
        """Scores `[B]` of inputs `[B, ...]`; higher is more ID."""
        return self.fitted.score(to_network_input(images, self.preprocess))

    def p_value(self, images: jax.Array) -> jax.Array:
        """p-values `[B]` of inputs `[B, ...]`; of an ID input, P(p <= a) <= a at any a."""
        return conformal_p_values(self.calibration_scores, self.score(images))

    def is_ood(self, images: jax.Array) -> jax.Array:
        """Whether the scores of inputs `[B, ...]` are below the threshold, `[B]` bool."""
        return self.judge(self.score(images))[1]

    def decide(self, images: jax.Array) -> Decision:
        """All of these, and the predicted classes, of inputs `[B, ...]` in one forward pass."""
        inputs = to_network_input(images, self.preprocess)
        fitted = self.fitted
        outputs = fitted.model(inputs)
        scores = fitted.detector.score(fitted.state, fitted.model, Batch(inputs, outputs))
        largest = outputs.logits.argmax(axis=-1).astype(jnp.int32)
        return Decision(scores, *self.judge(scores), largest - self.label_offset)

    def judge(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The p-values of scores `[B]`, and whether they are out-of-distribution."""
        threshold, wide = to_common_float(self.threshold, scores)
        # What is not a number never passes.
        return conformal_p_values(self.calibration_scores, scores), ~(wide >= threshold)


def calibrate(
    detector: str | Detector,
    model: Model,
    id_data: Any,
    *,
    fit: Any = None,
    tpr: float = 0.95,
    confidence: float = 0.95,
    confident: bool = False,
    preprocess: Prepare | str = None,
    label_offset: int = 0,
    batch_size: int = 64,
    max_undecodable: float = 0.01,
    progress: Any = None,
) -> Calibrated:
    """Calibrates a detector on held-out in-distribution (ID) data, so that it can decide.

    >>> calibrated = calibrate("gradnorm", model, held_out_images)
    >>> calibrated.decide(images).is_ood
    >>> jax.jit(Calibrated.p_value)(calibrated, images)

    Guaranteed are p-values and, by `tpr`, the rate of false alarms on new ID inputs, if these are
    exchangeable with the calibration data; nothing is said about how many OOD inputs are found. See
    `conformal_p_values` and `threshold_at_tpr`.

    Args:
        detector: a name, such as "gradnorm(ord=2)", or a `Detector`.
        model: the classifier.
        id_data: ID data of any kind that `evaluate` takes, without labels if there are none, that
            neither the network nor the detector is trained on.
        fit: ID training data, for a detector that is fitted; see `gradnorm_jax.fit`.
        tpr: the fraction of new ID inputs that shall be recognised as such, in (0, 1).
        confidence: of the interval for the true positive rate, in (0, 1).
        confident: choose the threshold such that the true positive rate is at least `tpr` with this
            confidence, rather than on average over calibration sets.
        preprocess: what makes the network's input of the data, as in `evaluate`.
        label_offset: class k is logit k + label_offset; it matters to the predicted class alone.
        batch_size: of all devices; no result depends on it, up to rounding.
        max_undecodable: the largest fraction of image files that may be undecodable.
        progress: as in `evaluate`.

    Raises:
        ValueError: an option is out of range, the data are too few for it, a score is not finite,
            or the calibration data are the training data.
    """
    from gradnorm_jax.data import as_stream
    from gradnorm_jax.evaluation.checks import same_data
    from gradnorm_jax.evaluation.in_memory import score_set

    prepare = get_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    reading: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    stream = as_stream(id_data, prepare, name=CALIBRATION)
    at = confidence if confident else None
    if stream.length is not None:
        threshold_rank(stream.length, tpr, at)  # raises before any work is done
    if fit is not None:
        fit = as_stream(fit, prepare, name="fit")
        if same_data({CALIBRATION: stream, "fit": fit}):
            raise ValueError(
                "the calibration data are the training data (fit), which promises nothing about "
                "new data: hold some out"
            )
    fitted = fit_detector(detector, model, fit, preprocess=prepare, **reading)
    table = score_set(
        CALIBRATION,
        model,
        stream,
        fitted.detector,
        fitted.state,
        preprocess=prepare,
        max_undecodable=max_undecodable,
        **reading,
    )
    scores = jnp.sort(jnp.asarray(table.scores[fitted.detector.name]))
    threshold = threshold_at_tpr(scores, tpr, confidence=at)
    return Calibrated(fitted, scores, threshold, tpr, confidence, confident, prepare, label_offset)
