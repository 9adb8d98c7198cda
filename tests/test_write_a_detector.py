"""The documentation's own detectors run as they stand there."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import gradnorm_jax as gj
from gradnorm_jax.detectors import parse_detectors
from tests.documentation import code_of

PAGE = Path(__file__).parents[1] / "docs" / "write_a_detector.md"


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.relu(nn.Dense(8)(x)))


def test_the_code_in_the_documentation_runs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 6)).astype(np.float32)
    variables = Network().init(jax.random.key(0), inputs)
    model = gj.from_linen(Network(), variables, inputs[:2])
    names = {
        "model": model,
        "images": jnp.asarray(inputs[:4]),
        "test_images": inputs[:20],
        "noise_images": 3 * inputs[20:],
        "train_images": inputs,
        "train_labels": np.arange(60) % 5,
    }
    blocks = code_of(PAGE)
    assert len(blocks) == 5
    with jax.numpy_rank_promotion("allow"):  # as users' code may
        for block in blocks:
            exec(block, names)
    assert list(names["result"].metrics) == ["cosine", "inside", "mahalanobis"]
    assert "largest" in names["one_pass"].metrics

    features, logits = map(np.asarray, model(inputs))
    directions = np.stack(
        [(features / np.linalg.norm(features, axis=1)[:, None])[c::5].sum(axis=0) for c in range(5)]
    )
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = features[:4] @ directions.T / np.linalg.norm(features[:4], axis=1, keepdims=True)
    np.testing.assert_allclose(names["scores"], cosines.max(axis=1), rtol=1e-5)
    inside = names["result"].scores["inside", "ID"]
    np.testing.assert_array_equal(inside, 1.0)  # all of them are among the training data

    (tmp_path / "my_module.py").write_text("\n".join(blocks[:2]).split("result =")[0] + blocks[1])
    monkeypatch.syspath_prepend(tmp_path)
    (margin,) = parse_detectors(["my_module:margin(power=2)"])
    batch = gj.Batch(None, gj.Outputs(features, logits))
    ordered = np.sort(logits, axis=1)
    np.testing.assert_allclose(
        margin.score(None, model, batch), (ordered[:, -1] - ordered[:, -2]) ** 2, rtol=1e-5
    )
