"""Every network against an independent implementation in PyTorch.

The goldens are made by `experiments/goldens/networks.py`: features, logits and GradNorm in float64,
and the keys and shapes of the weights.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax.models import MODELS
from gradnorm_jax.models.architecture import find_layout, template
from gradnorm_jax.models.checkpoint import check_layout, merge, to_variables

FOLDER = Path(__file__).parent / "goldens"
SMALL = {
    # golden: network, what it has fewer of
    "resnet_basic": ("resnet18", {"depths": (1, 1, 1, 1)}),
    "resnet_bottleneck": ("resnet50", {"depths": (1, 1, 1, 1)}),
    "resnet_wide": ("wide_resnet50_2", {"depths": (1, 1, 1, 1)}),
    "resnet_cifar": ("resnet18_cifar", {"depths": (1, 1, 1, 1)}),
    "resnet_option_a": ("resnet20_cifar", {"depth": 14}),
    "densenet": ("densenet121", {"depths": (2, 2, 2, 2), "growth": 8}),
    "densenet_cifar": ("densenet101_cifar", {"depth": 16}),
    "wide_resnet_cifar": ("wide_resnet40_2_cifar", {"depth": 16}),
    "vit": ("vit_ti16", {"depth": 2}),
    "vit_npz": ("vit_ti16", {"depth": 2}),
    "squeezenet1_1": ("squeezenet1_1", {}),
}
WHOLE = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "densenet121",
    "mobilenet_v2_torch",
    "vit_b16",
    "vit_s16",
    "vit_ti16",
    "resnet18_cifar",
    "resnet110_cifar",
    "wide_resnet40_2_cifar",
    "densenet101_cifar",
)
SIZES = {"vit": 48, "vit_npz": 48}


@dataclasses.dataclass(frozen=True)
class Golden:
    """A network with the weights of a golden, and what comes out of it."""

    row: object
    module: object
    variables: dict
    images: jax.Array
    expected: dict


def load(name, formula):
    network, options = SMALL.get(name, (name, {}))
    row = MODELS[network]
    size = SIZES.get(name, row.image_size)
    build = functools.partial(row.build, **options)
    row = dataclasses.replace(row, build=build, image_size=size)
    expected = dict(np.load(FOLDER / f"{name}.npz"))
    shapes = json.loads(expected.pop("shapes").tobytes())
    weights = formula.named_weights({key: tuple(shape) for key, shape in shapes.items()})
    weights = {key: array.astype(np.float32) for key, array in weights.items()}
    variables = to_variables(weights, template(row, 10), find_layout(weights, row).entry)
    side = min(size, 64) if row.head is None or "fc" in row.head.kernel[0] else size
    side = size if size < 64 or network.startswith("vit") else 64
    images = jnp.asarray(formula.numbers((2, side, side, 3), seed=0), jnp.float32)
    return Golden(row, row.build(10), variables, images, expected)


def assert_agreement(golden):
    outputs = jax.jit(golden.module.apply)(golden.variables, golden.images)
    logits = golden.expected["logits"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    if golden.row.head is None:
        norms = gradnorm_by_name(golden)
    else:
        features = golden.expected["features"]
        np.testing.assert_allclose(
            outputs.features, features, rtol=0, atol=1e-4 * np.abs(features).max()
        )
        norms = gj.gradnorm(*outputs)
    np.testing.assert_allclose(norms, golden.expected["gradnorm"], rtol=1e-5)


def gradnorm_by_name(golden):
    model = gj.from_linen(golden.module, golden.variables, golden.images, find_head=False)
    return gj.gradnorm_of_parameters(model, golden.images, select="/".join(golden.row.classifier))


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, formula):
    assert_agreement(load(name, formula))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks(name, formula):
    assert_agreement(load(name, formula))


@pytest.mark.parametrize("name", WHOLE)
def test_keys_and_shapes(name):
    """No key missing, none too many, without building the weights."""
    shapes = json.loads(np.load(FOLDER / f"{name}.npz")["shapes"].tobytes())
    headers = {k: jax.ShapeDtypeStruct(tuple(s), jnp.float32) for k, s in shapes.items()}
    row = MODELS[name]
    check_layout(headers, merge(template(row, 10)), find_layout(headers, row).entry)
