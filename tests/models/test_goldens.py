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
    layout = find_layout(weights, row)
    weights = layout.clean(weights)
    variables = to_variables(weights, template(row, 10), layout.entry)
    side = size if size < 64 or network.startswith("vit") else 64
    images = jnp.asarray(formula.numbers((2, side, side, 3), seed=0), jnp.float32)
    return Golden(row, row.build(10), variables, images, expected)


def assert_agreement(golden, outputs):
    logits, norms = golden.expected["logits"], golden.expected["gradnorm"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    if golden.row.head is None:
        assert outputs.features is None
        np.testing.assert_allclose(gradnorm_by_name(golden), norms, rtol=1e-5)
    else:
        features = golden.expected["features"]
        bound = 1e-4 * np.abs(features).max()
        np.testing.assert_allclose(outputs.features, features, rtol=0, atol=bound)
        np.testing.assert_allclose(gj.gradnorm(*outputs), norms, rtol=1e-5)


def gradnorm_by_name(golden):
    model = gj.from_linen(golden.module, golden.variables, golden.images, find_head=False)
    return gj.gradnorm_of_parameters(model, golden.images, select="/".join(golden.row.classifier))


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, formula):
    golden = load(name, formula)
    model = find_head(golden.row, golden.variables, golden.images)

    @jax.jit
    def both(model, images):
        # Of one program, most of which both share.
        return golden.module.apply(golden.variables, images), model.apply(model.params, images)

    own, found = both(model, golden.images)
    assert_agreement(golden, own)
    assert_agreement(golden, found)


def find_head(row, variables, images):
    """What the adapter makes of the module, of the program alone."""
    images = jax.ShapeDtypeStruct(images.shape, images.dtype)
    module, has_head = row.build(10), row.head is not None
    model = gj.from_linen(module, variables, images, find_head=has_head)
    assert model.head == row.head
    return model


@pytest.mark.whole
@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks(name, formula):
    golden = load(name, formula)
    assert_agreement(golden, jax.jit(golden.module.apply)(golden.variables, golden.images))


@pytest.mark.whole
@pytest.mark.parametrize("name", WHOLE)
def test_keys_shapes_and_head(name):
    """No key missing, none too many, and the head is found; all without building the weights."""
    shapes = json.loads(np.load(FOLDER / f"{name}.npz")["shapes"].tobytes())
    headers = {k: jax.ShapeDtypeStruct(tuple(s), jnp.float32) for k, s in shapes.items()}
    row = MODELS[name]
    variables = template(row, 10)
    check_layout(headers, merge(variables), find_layout(headers, row).entry)
    side = row.image_size
    find_head(row, variables, jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))
