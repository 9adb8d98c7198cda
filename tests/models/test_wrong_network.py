"""Weights of one network that are taken for another's, by shapes and types alone."""

import itertools

import jax
import pytest

from gradnorm_jax import models
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.models import MODELS
from gradnorm_jax.models.architecture import FLAX, fits, template
from gradnorm_jax.models.checkpoint import from_params, merge
from gradnorm_jax.weights.published import PUBLISHED

# The first of each family, so that few have to be traced before it is found.
FAMILIES = list(
    {getattr(row.build, "func", row.build): row for row in [*MODELS.values()][::-1]}.values()
)
PAIRS = [*itertools.permutations(FAMILIES, 2)]


def headers(architecture, layout, num_classes=17):
    variables = merge(template(architecture, num_classes))
    return jax.eval_shape(lambda tree: from_params(tree, layout.entry), variables)


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_layout_of_a_network_is_recognised(row):
    for layout in (*row.layouts, FLAX):
        assert fits(headers(row, layout), row), layout.name


@pytest.mark.parametrize(("of", "taken_for"), PAIRS, ids=lambda row: row.name)
def test_the_right_network_is_named(of, taken_for):
    with pytest.raises(
        ValueError, match=rf"^these are weights of {of.name} and not of {taken_for.name}: "
    ):
        models._check(headers(of, of.layouts[0]), taken_for)


def test_weights_of_no_known_network_are_listed():
    found = dict(headers(MODELS["mobilenet_v2"], FLAX))
    found["head/bias"] = jax.ShapeDtypeStruct((5,), "float32")
    with pytest.raises(ValueError, match=r"head/bias is float32\[5\] in place of float\[17\]"):
        models._check(found, MODELS["mobilenet_v2"])


def test_published_weights_are_of_known_networks_and_preprocessing():
    assert {row.model for row in PUBLISHED.values()} <= MODELS.keys()
    for row in PUBLISHED.values():
        if row.preprocess:
            assert get_preprocess(row.preprocess).size == MODELS[row.model].image_size
