"""The computation of one batch on the devices: one forward pass for all detectors.

Further passes, too, are taken once for all detectors that read the same.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gradnorm_jax.data.preprocess import Prepare, to_network_input
from gradnorm_jax.detectors import Batch, Detector, Reading, take_passes
from gradnorm_jax.sharding import batch_mesh, batch_sharding, map_batch, replicated
from gradnorm_jax.types import Model, Outputs

States = Mapping[str, Any]
"""What fitted detectors have learned, by their names."""


class Scored(NamedTuple):
    """What is computed of a batch.

    Attributes:
        predictions: `[B]`, the largest logit of each input.
        scores: `[B]` by detector.
        outputs: features `[B, D]` and logits `[B, C]`.
        readings: rows `[B, K]` by what is read inside the network.
        finite: `[B]`, whether the network's input, the features and the logits are. Inside of the
            network this sees nothing: XLA for CPUs turns NaN into 0 where it compiles a rectifier
            and a mean into one loop.
    """

    predictions: jax.Array
    scores: dict[str, jax.Array]
    outputs: Outputs
    readings: dict[str, jax.Array]
    finite: jax.Array


class Placement(NamedTuple):
    """Where batches are computed.

    Attributes:
        mesh: the devices, over all of which a batch is spread.
        params_are_split: whether they hold the parameters between them, as in fully sharded
            training, instead of a copy each. The compiler then gathers what it needs.
    """

    mesh: Mesh
    params_are_split: bool = False


def place_model(model: Model, mesh: Mesh | None = None) -> tuple[Model, Placement]:
    """The model where it is to be computed: on all devices of this process, unless it is split.

    Args:
        model: the classifier. Parameters that are spread over several devices stay as they are.
        mesh: the devices for one that is not.

    Raises:
        ValueError: the parameters are spread over devices of other processes.
    """
    shardings = [x.sharding for x in jax.tree.leaves(model) if isinstance(x, jax.Array)]
    split = [s for s in shardings if not s.is_fully_replicated]
    if any(not s.is_fully_addressable for s in shardings):
        raise ValueError(
            "the parameters are spread over devices of several processes, and each process scores "
            "its share by itself: give every process its own copy "
            "(jax.experimental.multihost_utils.process_allgather)"
        )
    if split:
        mesh = getattr(split[0], "mesh", None)
        if not isinstance(mesh, Mesh):
            raise ValueError(
                f"parameters are spread over devices by {split[0]}; give a NamedSharding"
            )
        return model, Placement(mesh, params_are_split=True)
    mesh = batch_mesh() if mesh is None else mesh
    return jax.device_put(model, replicated(mesh)), Placement(mesh)


@functools.partial(jax.jit, static_argnames=("detectors", "preprocess", "placement", "readings"))
def score_batch(
    model: Model,
    states: States,
    data: Any,
    *,
    detectors: tuple[Detector, ...],
    preprocess: Prepare,
    placement: Placement,
    readings: tuple[Reading, ...] = (),
) -> Scored:
    """Scores inputs `[B, ...]`, or the `Outputs` kept of them, without the network.

    B must be a multiple of the number of devices. `states` holds the state of each detector, and of
    each reading, that is fitted.
    """

    def score_slice(shared: tuple[Model, States], data: Any) -> Scored:
        model, states = shared
        if isinstance(data, Outputs):
            batch = Batch(None, data)
        else:
            inputs = to_network_input(data, preprocess)
            batch = take_passes((*detectors, *readings), model, Batch(inputs, model(inputs)))
        scores = {d.name: d.score(states.get(d.name), model, batch) for d in detectors}
        rows = {r.name: r(states.get(r.name), model, batch) for r in readings}
        finite = _finite_rows((batch.images, batch.outputs))
        return Scored(batch.outputs.logits.argmax(axis=-1), scores, batch.outputs, rows, finite)

    if placement.params_are_split:
        return score_slice((model, states), data)
    return map_batch(score_slice, placement.mesh)((model, states), data)


def _finite_rows(arrays: Any) -> jax.Array:
    rows = [
        jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
        for x in jax.tree.leaves(arrays)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return functools.reduce(jnp.logical_and, rows)


def put_batch(data: Any, placement: Placement) -> Any:
    """Arrays `[B, ...]` of the host, spread over the devices."""
    return jax.device_put(data, batch_sharding(placement.mesh))


def put_states(states: States, placement: Placement) -> States:
    """What detectors have learned, on every device."""
    return jax.device_put(states, replicated(placement.mesh))
