"""What the training recipes share: optimiser, state, step, augmentation, evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

import gradnorm_jax as gj
from gradnorm_jax.data.preprocess import Preprocess, scale
from gradnorm_jax.models import save_weights

Metrics = dict[str, float]


def parse_sets(specs: Sequence[str]) -> dict[str, str]:
    """Data by the name of their set, of NAME=DATA.

    Raises:
        ValueError: there is none, or one is written otherwise.
    """
    if not specs:
        raise ValueError("no OOD set is given; give at least one as NAME=DATA")
    for spec in specs:
        if not all(spec.partition("=")):
            raise ValueError(f"cannot read OOD set {spec!r}; write NAME=DATA")
    return dict(spec.split("=", 1) for spec in specs)


class TrainState(train_state.TrainState):
    """A Linen training state with batch statistics; none for networks without."""

    batch_stats: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `apply` takes."""
        return {"params": self.params} | (
            {"batch_stats": self.batch_stats} if self.batch_stats else {}
        )


def create_state(
    network: nn.Module, variables: Mapping[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    return TrainState.create(
        apply_fn=network.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=optimizer,
    )


def make_optimizer(
    name: Literal["sgd", "adam"], rate: optax.Schedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """SGD with momentum 0.9, or Adam.

    Weight decay enters the gradient of all parameters, an L2 penalty on normalisation and biases
    too, as in PyTorch.
    """
    rule = optax.adam(rate) if name == "adam" else optax.sgd(rate, momentum=0.9)
    return optax.chain(optax.add_decayed_weights(weight_decay), rule)


def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on the cross entropy of `[B, H, W, 3]` and `[B]`: the new state, loss, accuracy.

    Under a mesh whose devices share the batch, gradients and batch statistics are of all of it.
    """
    # Networks without batch statistics are the same function in training.
    mode = {"train": True} if state.batch_stats else {}

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = state.variables | {"params": params}
        outputs, updates = state.apply_fn(variables, images, mutable=["batch_stats"], **mode)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
        return losses.mean(), (outputs.logits, updates)

    (loss, (logits, updates)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(
        grads=gradients, batch_stats=updates.get("batch_stats", state.batch_stats)
    )
    return state, {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


def augment(key: jax.Array, pixels: jax.Array, size: int, padding: int = 0) -> jax.Array:
    """A random square `[B, size, size, 3]` of each image, or its mirror image.

    Args:
        key: PRNG key.
        pixels: `[B, H, W, 3]`.
        size: of the squares.
        padding: how many black pixels to put around the images before.
    """
    crop_key, flip_key = jax.random.split(key)
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(pixels, edges)
    B, height, width, _ = padded.shape
    most = jnp.array([[height, width]]) - size
    corners = jax.random.randint(crop_key, (B, 2), 0, most + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))

    cropped = jax.vmap(crop)(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(B, 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


def augmented_step(
    state: TrainState,
    key: jax.Array,
    pixels: jax.Array,
    labels: jax.Array,
    preprocess: Preprocess,
    padding: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`train_step` on augmented pixels; the augmentation is a function of key and step number."""
    key = jax.random.fold_in(key, state.step)
    images = scale(augment(key, pixels, preprocess.size, padding), preprocess)
    return train_step(state, images, labels)


def mean_metrics(metrics: Iterable[Mapping[str, jax.Array]]) -> Metrics:
    """The mean of each metric over steps, fetched from the devices at once."""
    columns = jax.device_get(jax.tree.map(lambda *values: jnp.stack(values).mean(), *metrics))
    return {name: float(value) for name, value in columns.items()}


def make_evaluate(
    network: nn.Module, state: TrainState, size: int, **arguments: Any
) -> Callable[[TrainState], Metrics]:
    """`state -> metrics` of a network in training for images of `size` x `size` pixels.

    `arguments` are those of `gradnorm_jax.evaluate` but for the model.
    """
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    # Where the last layer is does not change in training: it is looked for once.
    model = gj.from_linen(network, state.variables, images)

    def evaluate(state: TrainState) -> Metrics:
        statistics = {"batch_stats": state.batch_stats} if state.batch_stats else {}
        trained = model.replace(params=state.params, state=statistics)
        return ood_metrics(gj.evaluate(trained, progress=False, **arguments))

    return evaluate


def ood_metrics(result: gj.Result) -> Metrics:
    """Accuracy on ID data, and AUROC and FPR95 (ID positive) by detector and OOD set."""
    metrics = {} if result.accuracy is None else {"test_accuracy": result.accuracy}
    for detector, cells in result.metrics.items():
        for name, cell in cells.items():
            metrics[f"{detector}/{name}/auroc"] = cell.auroc.value
            metrics[f"{detector}/{name}/fpr95"] = cell.fpr_at_95_tpr_id_positive.value
    return metrics


def export(state: TrainState, name: str, folder: Path) -> None:
    """Writes `weights.npz`, which `gradnorm-jax evaluate` reads as those of the network `name`."""
    statistics = {"batch_stats": state.batch_stats} if state.batch_stats else None
    save_weights(state.params, name, folder / "weights.npz", state=statistics)
