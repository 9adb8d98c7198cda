"""Weights of one network that are taken for another's, by shapes and types alone."""

import itertools

import jax
import pytest

from gradnorm_jax import models
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.models import MODELS
from gradnorm_jax.models.architecture import FLAX, Size, fits, template
from gradnorm_jax.models.checkpoint import from_params, merge
from gradnorm_jax.tree import get_leaf
from gradnorm_jax.weights.published import PUBLISHED

# The first of each family, so that few have to be traced before it is found.
FAMILIES = list(
    {getattr(row.build, "func", row.build): row for row in [*MODELS.values()][::-1]}.values()
)
QUICK = {"mobilenet_v2", "resnet18", "resnet20_cifar"}
"""Tracing the others takes seconds."""


def marked(*rows):
    quick = {row.name for row in rows} <= QUICK
    return pytest.param(
        *rows,
        id="-".join(row.name for row in rows),
        marks=() if quick else pytest.mark.whole,
    )


def headers(architecture, layout, num_classes=None):
    variables = merge(template(architecture, num_classes or architecture.num_classes))
    return jax.eval_shape(lambda tree: from_params(tree, layout.entry), variables)


@pytest.mark.parametrize("row", [*map(marked, MODELS.values())])
def test_the_table_tells_the_size_of_a_network(row):
    variables = template(row, row.num_classes)
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in variables.items()}
    features = row.head and get_leaf(variables["params"], row.head.kernel).shape[-2]
    assert row.size == Size(features, sizes["params"], sizes.get("batch_stats", 0))


def test_networks_of_another_size_are_not_traced():
    resnet = MODELS["resnet18"]
    found = headers(resnet, resnet.layouts[0])
    traced = template.cache_info().misses
    assert [row.name for row in MODELS.values() if fits(found, row)] == ["resnet18"]
    assert template.cache_info().misses == traced


@pytest.mark.parametrize("row", [*map(marked, FAMILIES)])
def test_every_layout_of_a_network_is_recognised(row):
    for layout in (*row.layouts, FLAX):
        assert fits(headers(row, layout, num_classes=7), row), layout.name


@pytest.mark.parametrize(
    ("of", "taken_for"), [*itertools.starmap(marked, itertools.permutations(FAMILIES, 2))]
)
def test_the_right_network_is_named(of, taken_for):
    with pytest.raises(
        ValueError, match=rf"^these are weights of {of.name} and not of {taken_for.name}: "
    ):
        models._check(headers(of, of.layouts[0]), taken_for)


def test_weights_of_no_known_network_are_listed():
    squeezenet = MODELS["squeezenet1_1"]
    found = dict(headers(squeezenet, squeezenet.layouts[0]))
    found["classifier.1.bias"] = jax.ShapeDtypeStruct((5,), "float32")
    with pytest.raises(ValueError, match=r"1\.bias is float32\[5\] in place of float\[1000\]"):
        models._check(found, squeezenet)


def test_published_weights_are_of_known_networks_and_preprocessing():
    assert {row.model for row in PUBLISHED.values()} <= MODELS.keys()
    for row in PUBLISHED.values():
        if row.preprocess:
            assert get_preprocess(row.preprocess).size == MODELS[row.model].image_size
