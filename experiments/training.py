"""What the training recipes share: images in memory, the state, the step, runs that resume."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pyarrow.parquet
from flax import linen as nn
from flax.training import train_state

import gradnorm_jax as gj
from gradnorm_jax.data.preprocess import Preprocess, scale
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source import Record, hash_records
from gradnorm_jax.models import save_weights

Metrics = dict[str, float]
OPTIONS, HISTORY = "options.json", "history.jsonl"


class ParquetSource:
    """The encoded images of a Parquet file, or folder of such, with columns `image` and `label`."""

    ignored = ()

    def __init__(self, path: str | Path) -> None:
        """Reads the file, not yet its images."""
        table = pyarrow.parquet.read_table(path, columns=["image", "label"]).combine_chunks()
        self.name = Path(path).name
        self._images, self._labels = table["image"], table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int, /) -> Record:
        return Record(str(index), int(self._labels[index]), self._images[index].as_py())

    def fingerprint(self) -> str:
        """A hash of all images and labels."""
        return hash_records(self.name, (self[index] for index in range(len(self))))


def read_images(spec: str, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """All pixels `[N, H, W, 3]` uint8 and labels `[N]` of a data set that fits into memory.

    Args:
        spec: a path that ends in `.parquet`, or whatever `gradnorm_jax.evaluate` reads by name: a
            folder of images, `csv:FILE`, `tfds:NAME:SPLIT`.
        preprocess: decides their size.

    Raises:
        ValueError: an image cannot be decoded.
    """
    source = ParquetSource(spec) if spec.endswith(".parquet") else spec
    batches = list(gj.as_stream(source, preprocess).batches(BatchSchedule(1000)))
    for excluded in (each for batch in batches for each in batch.excluded):
        raise ValueError(f"{spec}: {excluded.id} cannot be used: {excluded.reason}; remove it")
    pixels = np.concatenate([batch.data[batch.mask] for batch in batches])
    return pixels, np.concatenate([batch.labels for batch in batches])


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


def run_rounds(
    state: TrainState,
    rounds: int,
    run_round: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    folder: Path,
    options: Any,
) -> TrainState:
    """Trains in rounds, and resumes after the last one that a killed run has kept.

    After each round `folder` holds a checkpoint and a line of metrics. Where a round is a function
    of the state and its number alone, a resumed run is an undisturbed one, bit for bit.

    Args:
        state: before the first round; it also says how arrays are spread over devices.
        rounds: how many.
        run_round: `(state, round) -> (state, metrics)`.
        folder: new, empty, or of the same run.
        options: a dataclass of all that decides the results.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    claim(folder, options)
    manager = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=manager) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
        history = read_history(folder)[:done]
        for number in range(done, rounds):
            state, metrics = run_round(state, number)
            history.append({"round": number + 1, **metrics})
            print(f"{number + 1}/{rounds}", *_format(metrics), sep="  ", flush=True)
            lines = "".join(json.dumps(line) + "\n" for line in history)
            (folder / HISTORY).write_text(lines)
            checkpoints.save(number + 1, args=ocp.args.StandardSave(state))
    return state


def claim(folder: Path, options: Any) -> None:
    """Writes the options of a run into its folder, or raises ValueError if it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / OPTIONS
    mine = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    if not file.exists():
        file.write_text(json.dumps(mine, indent=2))
        return
    theirs = json.loads(file.read_text())
    if differing := [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
        listed = ", ".join(f"{key} {theirs.get(key)!r}" for key in differing)
        raise ValueError(f"{folder} holds a run with {listed}; choose another --out")


def read_history(folder: Path) -> list[dict[str, float]]:
    """The metrics of each round so far."""
    file = folder / HISTORY
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def export(state: TrainState, name: str, folder: Path) -> None:
    """Writes `weights.npz`, which `gradnorm-jax evaluate` reads as those of the network `name`."""
    statistics = {"batch_stats": state.batch_stats} if state.batch_stats else None
    save_weights(state.params, name, folder / "weights.npz", state=statistics)


def plot_history(folder: Path) -> None:
    """Draws `curve.png`: what the history of a run holds, by round, in two panels."""
    from matplotlib.figure import Figure

    history = read_history(folder)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(name for line in history for name in line if name != "round"):
        if name.endswith("/fpr95"):
            continue
        points = [(line["round"], line[name]) for line in history if name in line]
        panels[int("/" in name)].plot(*zip(*points, strict=True), label=name, marker=".")
    for panel in panels:
        panel.set_xlabel("Round")
        if panel.lines:
            panel.legend(fontsize="x-small")
    figure.savefig(folder / "curve.png", dpi=150)


def _format(metrics: Metrics) -> Iterator[str]:
    for name, value in metrics.items():
        yield f"{name} {value:.4f}"
