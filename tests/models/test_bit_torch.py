"""BiT's weights by the names of PyTorch, of which these rules on the official names are another
account than the layout's."""

import re

import jax
import numpy as np
import pytest

from gradnorm_jax.models import load_model

RULES = [
    (r"resnet/root_block/standardized_conv2d/kernel", "root.conv.weight"),
    (r"resnet/head/conv2d/kernel", "head.conv.weight"),
    (r"resnet/head/conv2d/bias", "head.conv.bias"),
    (r"resnet/(block\d)/(unit\d\d)/a/proj/.*", r"body.\1.\2.downsample.weight"),
    *(
        rule
        for number, layer in enumerate("abc", 1)
        for rule in [
            (rf"resnet/(.*)/(.*)/{layer}/stand.*", rf"body.\1.\2.conv{number}.weight"),
            (rf"resnet/(.*)/(.*)/{layer}/.*gamma", rf"body.\1.\2.gn{number}.weight"),
            (rf"resnet/(.*)/(.*)/{layer}/.*beta", rf"body.\1.\2.gn{number}.bias"),
        ]
    ),
]


@pytest.mark.parametrize("norm", ["head.gn", "before_head.gn"])
def test_torch_names_are_of_the_same_network(tiny_file, tiny_weights, tmp_path, norm):
    rules = [
        *RULES,
        ("resnet/group_norm/gamma", f"{norm}.weight"),
        ("resnet/group_norm/beta", f"{norm}.bias"),
    ]
    renamed = {}
    for key, array in tiny_weights.items():
        (name,) = {re.sub(old, new, key) for old, new in rules if re.fullmatch(old, key)}
        # HWIO to OIHW.
        renamed[f"module.{name}"] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    np.savez(tmp_path / "w.npz", **renamed)
    pair = load_model("bit_tiny", tiny_file), load_model("bit_tiny", tmp_path / "w.npz")
    jax.tree.map(np.testing.assert_array_equal, *(model.params for model in pair))
