"""Fine-tunes a network, BiT by default, with the recipe behind the paper's ImageNet results.

    python experiments/finetune_bit.py --train tfds:imagenet2012:train \
        --test tfds:imagenet2012:validation --num-classes 1000 --model bit_r101x1 \
        --weights BiT-S-R101x1.npz --ood textures=dtd/images --out runs/finetuned

That is BiT-HyperRule: SGD with momentum 0.9 and no weight decay, batches of 512, rate 0.003 after
500 steps of linear warm-up, divided by 10 after 30, 60 and 90 % of 20,000 steps; images resized to
512 x 512, random crops of 480 and flips; a last layer that begins at zero. The rate is in
proportion to the batch. A run that was killed resumes: run the same command again.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import traverse_util

from experiments import runs, training
from experiments.training import Metrics, TrainState
from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import Preprocess, get_preprocess, resize
from gradnorm_jax.data.source import Record, Source
from gradnorm_jax.data.source_stream import available_cpus
from gradnorm_jax.models import get_architecture, load_model
from gradnorm_jax.models.architecture import Architecture
from gradnorm_jax.sharding import batch_mesh, batch_sharding, replicated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune a network on labelled images.

    Attributes:
        train: training images: `csv:FILE` with columns file and label, a folder with class
            subfolders, `list:FILE@FOLDER`, or `tfds:NAME:SPLIT`.
        test: in-distribution test images, likewise.
        num_classes: labels are 0 to this less one.
        out: folder for checkpoints, metrics, their plot, and weights: new, empty, or of the same
            run.
        weights: what to begin with, a .npz or .safetensors file; at random if none is given.
        model: the network.
        ood: out-of-distribution sets, each as NAME=DATA.
        detectors: what tells ID from OOD images.
        steps: how many.
        warm_up: how many of them the learning rate rises.
        batch_size: of all devices.
        learning_rate: the highest, if batches are of 512.
        resize: side in pixels to which the whole image is resized in training.
        crop: side of the random squares; test images are resized to this.
        evaluate_every: steps between evaluations and checkpoints.
        dtype: of the activations; parameters are float32 in any case.
        seed: of initialisation, order and augmentation.
    """

    train: str
    test: str
    num_classes: int
    out: Path
    ood: tuple[str, ...]
    weights: Path | None = None
    model: str = "bit_r101x1"
    detectors: tuple[str, ...] = ("msp", "energy", "gradnorm")
    steps: int = 20_000
    warm_up: int = 500
    batch_size: int = 512
    learning_rate: float = 0.003
    resize: int = 512
    crop: int = 480
    evaluate_every: int = 1000
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


def train(options: Options) -> TrainState:
    """Trains and evaluates; leaves checkpoints, metrics and weights."""
    architecture, source = get_architecture(options.model), open_source(options.train)
    network = architecture.build(options.num_classes, dtype=jnp.dtype(options.dtype))
    optimizer = training.make_optimizer("sgd", make_schedule(options))
    state = training.create_state(network, init_variables(options, architecture), optimizer)
    mesh = batch_mesh(jax.devices())
    state = jax.device_put(state, replicated(mesh))
    preprocess = squash(architecture, options.crop)
    evaluate = training.make_evaluate(
        network,
        state,
        options.crop,
        id_data=options.test,
        ood_data=training.parse_sets(options.ood),
        detectors=options.detectors,
        preprocess=preprocess,
    )
    step = jax.jit(
        functools.partial(training.augmented_step, preprocess=preprocess), donate_argnums=0
    )
    key, every = jax.random.key(options.seed), options.evaluate_every

    def run_round(state: TrainState, number: int) -> tuple[TrainState, Metrics]:
        steps = range(number * every, min((number + 1) * every, options.steps))
        collected = []
        for batch in read_batches(source, squash(architecture, options.resize), options, steps):
            state, metrics = step(state, key, *jax.device_put(batch, batch_sharding(mesh)))
            collected.append(metrics)
        return state, training.mean_metrics(collected) | evaluate(state)

    rounds = -(-options.steps // every)
    state = runs.run_rounds(state, rounds, run_round, options.out, options)
    training.export(state, architecture.name, options.out)
    return state


def make_schedule(options: Options) -> optax.Schedule:
    """The learning rate by step."""
    peak = options.learning_rate * options.batch_size / 512
    drops = {round(part * options.steps) - options.warm_up: 0.1 for part in (0.3, 0.6, 0.9)}
    parts = (
        optax.linear_schedule(0.0, peak, options.warm_up),
        optax.piecewise_constant_schedule(peak, drops),
    )
    return optax.join_schedules(parts, [options.warm_up])


def init_variables(options: Options, architecture: Architecture) -> dict[str, Any]:
    """Variables with the weights that are given, and a last layer of zeros.

    Raises:
        ValueError: the network has no linear last layer.
    """
    network, head = architecture.build(options.num_classes), architecture.head
    if head is None:
        raise ValueError(f"{architecture.name} has no linear last layer; choose another --model")
    images = jnp.zeros((1, options.crop, options.crop, 3))
    variables = dict(jax.jit(network.init)(jax.random.key(options.seed), images))
    params = traverse_util.flatten_dict(variables["params"])
    last = {path: jnp.zeros_like(params[path]) for path in (head.kernel, head.bias) if path}
    if options.weights is not None:
        loaded = load_model(options.model, options.weights)
        params = traverse_util.flatten_dict(loaded.params)
        variables |= dict(loaded.state)
    return variables | {"params": traverse_util.unflatten_dict(params | last)}


def squash(architecture: Architecture, size: int) -> Preprocess:
    """The whole image at `size` x `size` pixels, scaled as the network needs it."""
    return dataclasses.replace(
        get_preprocess(architecture.preprocess),
        name=f"{architecture.name} at {size}",
        size=size,
        transform=functools.partial(resize, size=size),
    )


def read_batches(
    source: Source, preprocess: Preprocess, options: Options, steps: range
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pixels `[B, size, size, 3]` and labels `[B]` of these steps, decoded in parallel.

    Every epoch is in an order of its own; it depends on the seed alone, so that training can begin
    at any step.
    """
    size = options.batch_size
    epochs = -(-options.steps * size // len(source))
    decode = functools.partial(_decode, preprocess=preprocess, num_classes=options.num_classes)
    dataset = (
        grain.MapDataset.source(source)
        .seed(options.seed)
        .shuffle()
        .repeat(epochs)
        .slice(slice(steps.start * size, steps.stop * size))
        .map(decode)
    )
    reading = grain.ReadOptions(num_threads=available_cpus(), prefetch_buffer_size=2 * size)
    yield from dataset.to_iter_dataset(reading).batch(size)


def _decode(
    record: Record, preprocess: Preprocess, num_classes: int
) -> tuple[np.ndarray, np.int32]:
    if not 0 <= record.label < num_classes:
        raise ValueError(
            f"{record.id} has label {record.label}; labels must be 0 to {num_classes - 1} "
            "(--num-classes)"
        )
    try:
        return preprocess.pixels(decode_rgb(record.data)), np.int32(record.label)
    except BadImage as error:
        raise ValueError(f"{record.id} cannot be used: {error}; remove it") from error


if __name__ == "__main__":
    options = tyro.cli(Options)
    train(options)
    runs.plot_history(options.out)
