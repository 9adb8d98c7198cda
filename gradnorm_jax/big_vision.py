"""OOD metrics in the training loop of big_vision, and of loops that call evaluators as it does."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gradnorm_jax.data.stream import pad_rows
from gradnorm_jax.detectors import Batch, Detector, parse_detectors
from gradnorm_jax.metrics import auroc, fpr_at_tpr
from gradnorm_jax.sharding import batch_mesh, batch_sharding
from gradnorm_jax.types import Model, Outputs, Variables

PredictFn = Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, Mapping[str, Any]]]
"""`(train_state, batch) -> (logits [B, C], {"pre_logits": features [B, D], ...})`."""

Batches = Iterable[Mapping[str, Any]]
"""Batches that can be read any number of times: `image` `[b, ...]`, `_mask` `[b]` if rows are
padding, and whatever else `predict_fn` reads."""


class Evaluator:
    """Yields AUROC and FPR95 of detectors on fixed ID and OOD data.

    >>> evaluator = Evaluator(predict_fn, id_batches, {"svhn": svhn_batches})
    >>> for name, value in evaluator.run(train_state):
    ...     writer.measure(name, value)  # gradnorm/svhn/auroc, gradnorm/svhn/fpr95

    It compiles once for each shape of batch, with the parameters as the loop has sharded them. Of
    several processes each gives its own rows, equally many batches of equal size, and all yield the
    same.
    """

    def __init__(
        self,
        predict_fn: PredictFn,
        id_data: Batches,
        ood_data: Mapping[str, Batches],
        *,
        detectors: Iterable[str | Detector] = ("gradnorm",),
        features_key: str = "pre_logits",
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Sets up the evaluation; nothing is computed yet.

        Args:
            predict_fn: pure function of the network in evaluation mode.
            id_data: in-distribution batches.
            ood_data: out-of-distribution batches, by the name of their set.
            detectors: those that need no more than logits and features.
            features_key: where `predict_fn` puts the input of the last layer.
            devices: those that batches are spread over; by default all.

        Raises:
            ValueError: a detector is fitted to data, or runs the network again.
        """
        self._detectors = parse_detectors(detectors)
        for detector in self._detectors:
            if detector.fit or detector.needs == "network":
                raise ValueError(
                    f"detector {detector.name!r} needs more than logits and features of one "
                    "forward pass; evaluate it by gradnorm_jax.evaluate"
                )
        self._data = {"": id_data, **ood_data}
        self._sharding = batch_sharding(batch_mesh(jax.devices() if devices is None else devices))
        self._score = jax.jit(self._make_score(predict_fn, features_key))

    def run(self, train_state: Any) -> Iterator[tuple[str, float]]:
        """The metrics of the network as it is now, `(name, value)`.

        Raises:
            ValueError: a set has no input, or a score is not finite.
        """
        scores = {name: self._scores(train_state, data) for name, data in self._data.items()}
        id_scores = scores.pop("")
        for name, ood_scores in scores.items():
            for detector in self._detectors:
                both = id_scores[detector.name], ood_scores[detector.name]
                yield f"{detector.name}/{name}/auroc", auroc(*both)
                yield f"{detector.name}/{name}/fpr95", fpr_at_tpr(*both)

    def _make_score(self, predict_fn: PredictFn, features_key: str) -> Callable[..., Any]:
        def score(train_state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            logits, out = predict_fn(train_state, batch)
            outputs = Outputs(out[features_key], logits)
            # These detectors read nothing of a model but what is in the batch.
            model = Model(jax.tree_util.Partial(_no_network), Variables({}), None)
            return {d.name: d.score(None, model, Batch(None, outputs)) for d in self._detectors}

        return score

    def _scores(self, train_state: Any, data: Batches) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {d.name: [] for d in self._detectors}
        for batch in data:
            arrays, mask = self._put(batch)
            scores = self._score(train_state, arrays)
            gathered, kept = multihost_utils.process_allgather((scores, mask), tiled=True)
            for name, values in gathered.items():
                found[name].append(np.asarray(values)[np.asarray(kept)])
        return {name: np.concatenate([*values, np.zeros(0)]) for name, values in found.items()}

    def _put(self, batch: Mapping[str, Any]) -> tuple[dict[str, jax.Array], jax.Array]:
        """The batch on the devices, filled up to a multiple of their number, and its mask."""
        rows = {key: np.asarray(value) for key, value in batch.items()}
        count = len(rows["image"])
        size = -(-count // jax.local_device_count()) * jax.local_device_count()
        mask = rows.get("_mask", np.ones(count, bool)).astype(bool)
        local = {
            **{key: pad_rows(x, size) for key, x in rows.items()},
            "_mask": pad_rows(mask, size),
        }
        arrays = jax.make_array_from_process_local_data(self._sharding, local)
        return arrays, jnp.asarray(arrays["_mask"])


def _no_network(variables: Variables, images: jax.Array) -> Outputs:
    raise NotImplementedError("an evaluator sees the outputs of the network, not the network")
