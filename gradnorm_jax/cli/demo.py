"""The demo: trains a small network on real digits and evaluates all detectors on it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradnorm_jax.cli.demo_data import OOD_SETS, write_images
from gradnorm_jax.cli.endings import tell
from gradnorm_jax.data import as_stream
from gradnorm_jax.data.preprocess import get_preprocess, scale
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.evaluation.evaluate import evaluate
from gradnorm_jax.evaluation.result import Result
from gradnorm_jax.models import (
    MODELS,
    get_architecture,
    init_model,
    load_model,
    save_weights,
)
from gradnorm_jax.progress import Track, no_progress, show_progress
from gradnorm_jax.tree import Params
from gradnorm_jax.types import Model

MODEL = "bit_tiny"


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Train a small ResNetV2 on real digits and evaluate detectors on it, without any download.

    Example: gradnorm-jax demo --out runs/demo

    Attributes:
        out: folder for images, weights and results; must not exist or be empty.
        steps: optimiser steps of training.
        seed: of initialisation and of the order of images.
    """

    out: Path = Path("runs/demo")
    steps: int = 300
    seed: int = 0


def run_demo(options: DemoOptions, progress: bool | Track | None = None) -> Result:
    """Writes images, trains a network on some of them, and evaluates it.

    The evaluation is that of `gradnorm-jax evaluate`, on folders of images and a checkpoint.

    Raises:
        ModuleNotFoundError: scikit-learn, whose images these are, is not installed.
        OSError: the folder is not empty or cannot be written.
    """
    images = _new_folder(options.out) / "images"
    tell("less than a minute: images are written, a small network is trained on them, evaluated")
    write_images(images)
    weights = options.out / "weights.npz"
    with show_progress(progress) as track:
        model = train(images / "train", options.steps, options.seed, track)
    save_weights(model.params, MODEL, weights)
    return evaluate(
        load_model(MODEL, weights),
        images / "test",
        {name: images / name for name in OOD_SETS},
        fit=images / "train",
        preprocess=get_architecture(MODEL).preprocess,
        out=options.out / "results",
        name=MODEL,
        progress=progress,
    )


def _new_folder(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists and is not empty; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path


def train(
    folder: Path,
    steps: int,
    seed: int,
    track: Track = no_progress,
    batch_size: int = 64,
    optimizer: optax.GradientTransformation | None = None,
) -> Model:
    """Trains `bit_tiny` on a folder of class subfolders, by default as `make_optimizer` says."""
    preprocess = get_preprocess(MODELS[MODEL].preprocess)
    stream = as_stream(folder, preprocess)
    assert stream.length is not None
    (everything,) = stream.batches(BatchSchedule(stream.length + 1))
    labels = jnp.asarray(everything.labels)
    images = scale(jnp.asarray(everything.data[everything.mask]), preprocess)

    model = init_model(MODEL, int(labels.max()) + 1, jax.random.key(seed))
    optimizer = optimizer or make_optimizer(steps)
    rng = np.random.default_rng(seed)
    params, state = model.params, optimizer.init(model.params)
    update = jax.jit(functools.partial(_update, model, optimizer))
    for _ in track(range(steps), "training", steps):
        chosen = rng.choice(len(labels), batch_size, replace=False)
        params, state = update(params, state, images[chosen], labels[chosen])
    return model.replace(params=params)


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and weight decay 1e-4, as the paper's networks are trained."""
    # At a rate of 0.1 some seeds do not learn.
    rate = optax.cosine_decay_schedule(0.03, steps)
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def _update(
    model: Model,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[Params, optax.OptState]:
    def loss(params: Params) -> jax.Array:
        logits = model.apply(params, images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
