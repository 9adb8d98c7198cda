"""The recipe on a network and images small enough for tests."""

import dataclasses
import functools
import io
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
import pytest
from flax import linen as nn
from PIL import Image

import gradnorm_jax as gj
from experiments import runs, train_cifar, training
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.models import get_architecture, load_model
from gradnorm_jax.sharding import batch_mesh, batch_sharding, replicated

RNG = np.random.default_rng(0)
PREPROCESS = get_preprocess("squash=32,mean=imagenet,std=imagenet")


def encode(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """64 images whose brightness tells their class, 0 or 1."""
    folder = tmp_path_factory.mktemp("images")
    labels = np.arange(64) % 2
    pixels = (RNG.integers(0, 128, (64, 32, 32, 3)) + 120 * labels[:, None, None, None]).astype(
        "u1"
    )
    table = pyarrow.table({"image": [*map(encode, pixels)], "label": labels})
    pyarrow.parquet.write_table(table, folder / "images.parquet")
    return folder / "images.parquet", pixels, labels


@pytest.fixture
def options(images, tmp_path):
    return train_cifar.Options(
        train=str(images[0]),
        test=str(images[0]),
        ood=(f"same={images[0]}",),
        out=tmp_path / "run",
        model="resnet20_cifar",
        epochs=3,
        batch_size=16,
        learning_rate=0.01,
        evaluate_every=3,
        detectors=("gradnorm",),
    )


def test_parquet_files_are_read_as_they_are(images):
    path, pixels, labels = images
    read, found = train_cifar.read_images(str(path), PREPROCESS)
    np.testing.assert_array_equal(read, pixels)
    np.testing.assert_array_equal(found, labels)


def test_augmentation_takes_squares_of_the_padded_image_and_their_mirror_images():
    pixels = jnp.asarray(RNG.integers(1, 256, (200, 6, 5, 3)), jnp.uint8)
    augmented = np.asarray(training.augment(jax.random.key(0), pixels, 4, padding=2))
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (1, 2))
    windows = np.moveaxis(windows, 3, -1).reshape(200, -1, 4, 4, 3)
    matches = (windows == augmented[:, None]).all((2, 3, 4))
    mirrored = (windows == augmented[:, None, :, ::-1]).all((2, 3, 4))
    assert (matches | mirrored).any(1).all()
    assert 70 < mirrored.any(1).sum() < 130
    # All 7 x 6 places are taken.
    assert (matches | mirrored).any(0).all()
    again = training.augment(jax.random.key(0), pixels, 4, padding=2)
    np.testing.assert_array_equal(augmented, again)


def test_what_cannot_be_trained_on_is_refused(options):
    data = train_cifar.read_data(options)
    with pytest.raises(ValueError, match="64 images are less than one batch of 128"):
        train_cifar.train(dataclasses.replace(options, batch_size=128), data)
    unlabelled = data._replace(train=(data.train[0], np.full(64, -1)))
    with pytest.raises(ValueError, match="has images without label"):
        train_cifar.train(options, unlabelled)
    with pytest.raises(ValueError, match="cannot read OOD set 'folder'; write NAME=DATA"):
        train_cifar.read_data(dataclasses.replace(options, ood=("folder",)))


def test_the_optimizer_is_that_of_pytorch():
    params, rate = np.array([1.0, -2.0]), 0.1
    optimizer = training.make_optimizer(
        "sgd", lambda step: rate * jnp.where(step < 2, 1, 0.1), 0.01
    )
    state, ours = optimizer.init(jnp.asarray(params)), jnp.asarray(params)
    momentum = np.zeros(2)
    for step in range(4):
        gradient = np.array([0.3, step], np.float32)
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        momentum = 0.9 * momentum + gradient + 0.01 * params
        params = params - rate * (1 if step < 2 else 0.1) * momentum
        np.testing.assert_allclose(ours, params, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("steps", {0: 0.1, 49: 0.1, 51: 0.01, 74: 0.01, 76: 1e-3, 89: 1e-3, 91: 1e-4, 99: 1e-4}),
        ("one-cycle", {0: 0.0, 10: 0.05, 20: 0.1, 60: 0.05, 100: 0.0}),
    ],
)
def test_schedules(options, schedule, expected):
    rate = train_cifar.make_schedule(
        dataclasses.replace(options, learning_rate=0.1, schedule=schedule), 100
    )
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5)


@pytest.mark.slow
def test_batch_statistics_and_gradients_are_those_of_the_whole_batch_on_any_number_of_devices():
    network = get_architecture("resnet20_cifar").build(4)
    pixels = jnp.asarray(RNG.integers(256, size=(16, 32, 32, 3)), jnp.uint8)
    key, labels = jax.random.key(0), jnp.arange(16) % 4

    def after_two_steps(devices):
        mesh = batch_mesh(jax.devices()[:devices])
        state = train_cifar.init_state(
            network, training.make_optimizer("sgd", lambda step: 0.01), 0
        )
        state = jax.device_put(state, replicated(mesh))
        batch = jax.device_put((pixels, labels), batch_sharding(mesh))
        step = jax.jit(functools.partial(training.augmented_step, preprocess=PREPROCESS, padding=4))
        for _ in range(2):
            state, metrics = step(state, key, *batch)
        return state.params, state.batch_stats, metrics

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4),
        after_two_steps(1),
        after_two_steps(8),
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0


class KilledError(Exception):
    pass


def test_a_run_resumes_to_the_same_bits(tmp_path):
    """One that ends between a round's metrics and its checkpoint too."""
    network = nn.Dense(3)
    variables = network.init(jax.random.key(0), jnp.ones((1, 3)))
    optimizer = training.make_optimizer("sgd", optax.constant_schedule(0.1))
    state = training.create_state(network, variables, optimizer)

    def run(folder, kill_at=None, options=Settings()):
        def run_round(state, number):
            if number == kill_at:
                raise KilledError
            x = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (5, 3))
            gradients = jax.grad(lambda p: jnp.square(network.apply({"params": p}, x)).mean())
            state = state.apply_gradients(grads=gradients(state.params))
            return state, {"norm": float(optax.tree.norm(state.params))}

        return runs.run_rounds(state, 4, run_round, tmp_path / folder, options)

    expected = run("whole")
    with pytest.raises(KilledError):
        run("killed", kill_at=2)
    history = tmp_path / "killed" / runs.HISTORY
    history.write_text(history.read_text() + '{"round": 3, "norm": 0.0}\n')
    found = run("killed")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert history.read_text() == (tmp_path / "whole" / runs.HISTORY).read_text()
    with pytest.raises(ValueError, match="killed holds a run with seed 0; choose another --out"):
        run("killed", options=Settings(seed=1))


@pytest.mark.slow
def test_a_killed_run_is_an_undisturbed_one_and_its_weights_score_as_it_did(options, images):
    line = [sys.executable, train_cifar.__file__, "--train", images[0], "--test", images[0]]
    line += ["--ood", f"same={images[0]}", "--detectors", "gradnorm", "--epochs", "4"]
    line += ["--batch-size", "16", "--learning-rate", "0.01", "--evaluate-every", "4", "--out"]

    def run(folder, kill_after=None):
        """Whether it came to its end, or was killed that many seconds after its first epoch."""
        process = subprocess.Popen([*map(str, line), str(folder)], env=os.environ)
        if kill_after is not None:
            while not (folder / runs.HISTORY).exists():
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        return process.wait() == 0

    whole, killed = options.out / "whole", options.out / "killed"
    assert run(whole)
    assert not run(killed, kill_after=0.5)
    assert run(killed)
    weights = [np.load(folder / "weights.npz") for folder in (whole, killed)]
    for key in weights[0]:
        np.testing.assert_array_equal(weights[0][key], weights[1][key])

    last = runs.read_history(killed)[-1]
    model = load_model("resnet20_cifar", killed / "weights.npz")
    again = gj.evaluate(
        model, images[1:], {"same": images[1]}, detectors=["gradnorm"], preprocess=PREPROCESS
    )
    assert last["test_accuracy"] == again.accuracy
    assert last["gradnorm/same/auroc"] == pytest.approx(again["gradnorm", "same"].auroc.value)
