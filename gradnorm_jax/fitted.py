"""A detector on its own: fitted to training data once, then a pure function of inputs."""

import dataclasses
from typing import Any

import jax

from gradnorm_jax.detectors import Batch, Detector, parse_detectors
from gradnorm_jax.types import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """A detector with a model and what it has learned; a pytree, so `jax.jit` takes it as argument.

    Attributes:
        detector: which.
        model: the classifier.
        state: what the detector has learned; None if there is nothing to learn.
    """

    detector: Detector = dataclasses.field(metadata={"static": True})
    model: Model
    state: Any

    def score(self, images: jax.Array) -> jax.Array:
        """Scores `[B]` of inputs `[B, ...]` as the network takes them; higher is more ID."""
        return self.detector.score(self.state, self.model, Batch(images, self.model(images)))


def fit(
    detector: str | Detector,
    model: Model,
    data: Any = None,
    *,
    preprocess: Any = None,
    batch_size: int = 64,
    progress: Any = None,
) -> Fitted:
    """Fits a detector to in-distribution training data.

    >>> fitted = fit("mahalanobis", model, (train_images, train_labels))
    >>> scores = jax.jit(Fitted.score)(fitted, images)

    Args:
        detector: a name, such as "gradnorm(ord=2)", or a `Detector`.
        model: the classifier.
        data: training data of any kind that `evaluate` takes, with labels if the detector needs
            them; None for a detector that learns nothing.
        preprocess: what makes the network's input of the data, as in `evaluate`; `Fitted.score`
            takes the network's input itself.
        batch_size: of all devices; no result depends on it, up to rounding.
        progress: as in `evaluate`.

    Raises:
        ValueError: the detector learns from data, and none are given, or they are unfit.
    """
    (detector,) = parse_detectors([detector])
    if detector.fit is None:
        return Fitted(detector, model, None)
    if data is None:
        raise ValueError(f"{detector.name} is fitted to ID training data: give them as data")
    from gradnorm_jax.evaluation.in_memory import fit_states

    states = fit_states(
        model, data, (detector,), preprocess=preprocess, batch_size=batch_size, progress=progress
    )
    return Fitted(detector, model, states[detector.name])
