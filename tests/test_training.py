"""OOD metrics inside training loops: the documentation's code, on meshes, without recompiling."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradnorm_jax as gj
from gradnorm_jax.big_vision import Evaluator
from tests.documentation import code_of

DOCS = Path(__file__).parents[1] / "docs"
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(32, 8, 8, 3)), jnp.float32)
OOD_IMAGES = jnp.asarray(RNG.uniform(size=(24, 8, 8, 3)), jnp.float32)
LABELS = jnp.arange(32) % 10


def test_the_code_in_the_documentation_runs(capsys):
    names = {
        "images": IMAGES,
        "labels": LABELS,
        "id_images": IMAGES[:16],
        "ood_images": OOD_IMAGES[:16],
    }
    blocks = code_of(DOCS / "training.md")
    assert len(blocks) == 3
    # Optax promotes types, as users' code may.
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(block, names)
    assert "gradnorm/noise/auroc" in capsys.readouterr().out


class Linen(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(16, (3, 3), strides=2)(images)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(8)(nn.relu(x).mean(axis=(1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.norm(self.conv(images))).mean(axis=(1, 2)))


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def spread(tree, mesh, *, split):
    """Each array on every device or, if `split`, cut along its last axis where that divides."""

    def put(x):
        axes = [None] * (x.ndim - 1) + ["data"] if x.ndim and x.shape[-1] % mesh.size == 0 else []
        spec = PartitionSpec(*axes) if split else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


@pytest.mark.parametrize(("devices", "split"), [(1, False), (8, False), (8, True)])
def test_linen_loop_with_parameters_as_it_shards_them(devices, split):
    mesh, network = mesh_of(devices), Linen()
    variables = network.init(jax.random.key(0), IMAGES, train=False)
    batch = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def ood_scores(variables, images):
        model = gj.from_linen(network, variables, images, train=False)
        return gj.gradnorm(*model(images))

    for step in range(3):
        variables = jax.tree.map(lambda x: x * (1 + 0.1 * step), variables)  # noqa: B023
        spread_out = spread(variables, mesh, split=split)
        alone = gj.gradnorm(*gj.from_linen(network, variables, IMAGES, train=False)(IMAGES))
        np.testing.assert_allclose(ood_scores(spread_out, batch), alone, rtol=1e-5)
    assert ood_scores._cache_size() == 1


@pytest.mark.parametrize(("devices", "split"), [(1, False), (8, False), (8, True)])
def test_nnx_loop_with_parameters_as_it_shards_them(devices, split):
    mesh, network = mesh_of(devices), Nnx(nnx.Rngs(0))
    batch = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
    optimizer = nnx.Optimizer(network, optax.sgd(0.1), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def ood_scores(network, images):
        traces.append(1)
        return gj.gradnorm(*gj.from_nnx(network, images)(images))

    @nnx.jit
    def train_step(network, optimizer, images):
        def loss_fn(network):
            logits = network(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS % 8).mean()

        optimizer.update(network, nnx.grad(loss_fn)(network))

    nnx.update(network, spread(nnx.state(network), mesh, split=split))
    nnx.update(optimizer, spread(nnx.state(optimizer), mesh, split=split))
    for _ in range(3):
        train_step(network, optimizer, batch)
        alone = nnx.clone(network)
        nnx.update(alone, jax.tree.map(np.asarray, nnx.state(alone)))
        expected = gj.gradnorm(*gj.from_nnx(alone, IMAGES)(IMAGES))
        np.testing.assert_allclose(ood_scores(network, batch), expected, rtol=1e-5)
    # NNX traces again when a step's outputs are sharded otherwise than what the loop began with.
    assert len(traces) <= 2


def predict_fn(variables, batch):
    model = gj.from_linen(Linen(), variables, batch["image"], train=False)
    features, logits = model(batch["image"])
    return logits, {"pre_logits": features}


def test_evaluator_honours_masks_and_gives_the_metrics_of_the_scores():
    variables = Linen().init(jax.random.key(0), IMAGES, train=False)
    padded = np.concatenate([np.asarray(OOD_IMAGES), np.full((5, 8, 8, 3), 99, np.float32)])
    evaluator = Evaluator(
        predict_fn,
        [{"image": IMAGES[:20]}, {"image": IMAGES[20:]}],
        {"uniform": [{"image": padded, "_mask": np.arange(29) < 24}]},
        detectors=["gradnorm", "energy"],
    )
    model = gj.from_linen(Linen(), variables, IMAGES, train=False)
    expected = {}
    for name, score in {
        "gradnorm": lambda images: gj.gradnorm(*model(images)),
        "energy": lambda images: gj.energy(model(images).logits),
    }.items():
        both = score(IMAGES), score(OOD_IMAGES)
        expected[f"{name}/uniform/auroc"] = gj.metrics.auroc(*both)
        expected[f"{name}/uniform/fpr95"] = gj.metrics.fpr_at_tpr(*both)
    assert dict(evaluator.run(variables)) == pytest.approx(expected, abs=1e-9)


def test_evaluator_refuses_what_it_cannot_compute():
    for name in ("mahalanobis", "odin(epsilon=0.1)"):
        with pytest.raises(ValueError, match=r"more than logits and features .* gradnorm_jax"):
            Evaluator(predict_fn, [], {}, detectors=[name])
