"""Trains a network on CIFAR as the paper does, and watches how it tells OOD images meanwhile.

    python experiments/train_cifar.py --train cifar10_train.parquet --test cifar10/test \
        --ood textures=dtd/images svhn=tfds:svhn_cropped:test --out runs/resnet20

The recipe is that of the ResNet paper: SGD with momentum 0.9, weight decay 1e-4 on all parameters
(an L2 penalty, on normalisation too, as in PyTorch), batches of 128, rate 0.1 divided by 10 after
1/2, 3/4 and 9/10 of the epochs, crops of images padded by 4 pixels, and flips. The images are
decoded once and live on the devices, where the step draws and augments its batch. A run that was
killed resumes: run the same command again.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

import gradnorm_jax as gj
from experiments import runs, training
from experiments.training import Metrics, TrainState
from gradnorm_jax.data.preprocess import Preprocess, get_preprocess, scale
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.models import get_architecture
from gradnorm_jax.sharding import batch_mesh, batch_sharding, replicated

PADDING = 4

Labelled = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train a network on images of 32 x 32 pixels.

    Attributes:
        train: training images: a `.parquet` file with columns image and label, a folder with class
            subfolders, `csv:FILE`, or `tfds:NAME:SPLIT`.
        test: in-distribution test images, likewise.
        out: folder for checkpoints, metrics by epoch and weights: new, empty, or of the same run.
        ood: out-of-distribution sets, each as NAME=DATA.
        detectors: what tells ID from OOD images.
        model: resnet20_cifar, densenet101_cifar, or another network for 32 x 32 images with batch
            normalisation (`gradnorm-jax evaluate --help` lists all).
        epochs: how many.
        batch_size: of all devices.
        optimizer: SGD with momentum 0.9, or Adam.
        learning_rate: the highest.
        weight_decay: factor of the L2 penalty, halved squares of all parameters.
        schedule: the steps of the paper; or, for a few epochs, one cycle: up for a fifth of the
            steps, and down to zero, linearly.
        dtype: of the activations; parameters are float32 in any case.
        evaluate_every: epochs between evaluations; there is one after the last epoch in any case.
        seed: of initialisation, order and augmentation.
    """

    train: str
    test: str
    out: Path
    ood: tuple[str, ...]
    detectors: tuple[str, ...] = ("msp", "energy", "gradnorm")
    model: str = "resnet20_cifar"
    epochs: int = 100
    batch_size: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    schedule: Literal["steps", "one-cycle"] = "steps"
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate_every: int = 1
    seed: int = 0


def read_images(spec: str, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """All pixels `[N, H, W, 3]` uint8 and labels `[N]` of a data set that fits into memory.

    Args:
        spec: whatever `gradnorm_jax.evaluate` reads by name: a folder of images, a `.parquet` file,
            `csv:FILE`, `tfds:NAME:SPLIT`.
        preprocess: decides their size.

    Raises:
        ValueError: an image cannot be decoded.
    """
    batches = list(gj.as_stream(spec, preprocess).batches(BatchSchedule(1000)))
    for excluded in (each for batch in batches for each in batch.excluded):
        raise ValueError(f"{spec}: {excluded.id} cannot be used: {excluded.reason}; remove it")
    pixels = np.concatenate([batch.data[batch.mask] for batch in batches])
    return pixels, np.concatenate([batch.labels for batch in batches])


class Data(NamedTuple):
    """Pixels `[N, 32, 32, 3]` uint8 and labels `[N]` of the sets of a run."""

    train: Labelled
    test: Labelled
    ood: dict[str, np.ndarray]


def read_data(options: Options) -> Data:
    """Decodes all images once."""
    preprocess = get_preprocess(get_architecture(options.model).preprocess)
    read = functools.partial(read_images, preprocess=preprocess)
    ood = {name: read(spec)[0] for name, spec in training.parse_sets(options.ood).items()}
    return Data(read(options.train), read(options.test), ood)


def train(options: Options, data: Data) -> TrainState:
    """Trains and evaluates; leaves checkpoints, metrics by epoch, and weights.

    Raises:
        ValueError: there are fewer images than one batch takes, an image has no label, or `out`
            holds another run.
    """
    architecture, count = get_architecture(options.model), len(data.train[1])
    preprocess = get_preprocess(architecture.preprocess)
    classes = int(data.train[1].max()) + 1
    network = architecture.build(classes, dtype=jnp.dtype(options.dtype))
    steps = count // options.batch_size
    if data.train[1].min(initial=0) < 0:
        raise ValueError(f"{options.train} has images without label; give a class to all")
    if not steps:
        raise ValueError(f"{count} images are less than one batch of {options.batch_size}")
    rate = make_schedule(options, steps * options.epochs)
    optimizer = training.make_optimizer(options.optimizer, rate, options.weight_decay)
    state = init_state(network, optimizer, options.seed)
    mesh = batch_mesh(jax.devices())
    state, (pixels, labels) = jax.device_put((state, data.train), replicated(mesh))
    evaluate = training.make_evaluate(
        network,
        state,
        preprocess.size,
        id_data=data.test,
        ood_data=data.ood,
        detectors=options.detectors,
        preprocess=functools.partial(scale, preprocess=preprocess),
        batch_size=1000,
    )
    key = jax.random.key(options.seed)

    # Images and labels are arguments, not constants, or they would be compiled into the program.
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, key: jax.Array, pixels: Any, labels: Any, rows: Any) -> Any:
        batch = pixels[rows], labels[rows]
        return training.augmented_step(state, key, *batch, preprocess, padding=PADDING)

    def run_epoch(state: TrainState, epoch: int) -> tuple[TrainState, Metrics]:
        start, collected = time.monotonic(), []
        order = np.random.default_rng((options.seed, epoch)).permutation(count)
        for rows in order[: steps * options.batch_size].reshape(steps, -1).astype(np.int32):
            rows = jax.device_put(rows, batch_sharding(mesh))
            state, metrics = step(state, key, pixels, labels, rows)
            collected.append(metrics)
        metrics = training.mean_metrics(collected) | {"seconds": time.monotonic() - start}
        last = epoch + 1 == options.epochs
        if last or (epoch + 1) % options.evaluate_every == 0:
            metrics |= evaluate(state)
        return state, metrics

    state = runs.run_rounds(state, options.epochs, run_epoch, options.out, options)
    training.export(state, architecture.name, options.out)
    return state


def init_state(
    network: nn.Module, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state of a network for images of 32 x 32 pixels before the first step."""
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
    return training.create_state(network, variables, optimizer)


def make_schedule(options: Options, steps: int) -> optax.Schedule:
    """The learning rate by step, of a number of steps in all."""
    peak = options.learning_rate
    if options.schedule == "steps":
        drops = {round(part * steps): 0.1 for part in (0.5, 0.75, 0.9)}
        return optax.piecewise_constant_schedule(peak, drops)
    up = steps // 5
    halves = optax.linear_schedule(0.0, peak, up), optax.linear_schedule(peak, 0.0, steps - up)
    return optax.join_schedules(halves, [up])


if __name__ == "__main__":
    options = tyro.cli(Options)
    train(options, read_data(options))
    runs.plot_history(options.out)
