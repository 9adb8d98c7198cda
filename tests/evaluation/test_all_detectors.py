"""All detectors of the table by every way through the evaluation: one result."""

import numpy as np
import pytest

from gradnorm_jax.adapters.apply import from_apply
from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
from gradnorm_jax.evaluation.records import Interrupted, Unfinished
from tests.detectors import inner_reference
from tests.evaluation import networks
from tests.evaluation.networks import inputs, labels

pytestmark = pytest.mark.slow


INNER = [
    "adascale_a",
    "nac_layers(layers=2)",
    "mahalanobis_layers(layers=2,magnitude=0)",
    "gram(layers=2)",
    "gradorth(layers=[block2/conv])",
]
"""Of inner layers, those that learn: in one pass of the training data, or two."""

ROUNDING = {"weiper": 5e-4}
"""Of the largest score, where that is more than for others: rounding moves a logit into the next
bin of a histogram now and then."""


def run(model, **options):
    return evaluate(
        model,
        (inputs(40), labels(40)),
        {"far": 3 * inputs(30, seed=1)},
        detectors=["all"],
        fit=(inputs(300, seed=2), labels(300)),
        progress=False,
        **{"batch_size": 16, **options},
    )


def assert_same(result, expected):
    assert not result.not_run
    assert list(result.metrics) == list(expected.metrics)
    for cell, scores in expected.scores.items():
        atol = ROUNDING.get(cell[0], 2e-5) * np.abs(scores).max()
        np.testing.assert_allclose(result.scores[cell], scores, rtol=2e-4, atol=atol, err_msg=cell)


def test_memory_folder_cache_and_processes(tmp_path):
    model = networks.build()
    expected = run(model)
    assert list(expected.metrics) == [d.name for d in parse_detectors(["all"])]

    assert_same(run(model, out=tmp_path / "folder", cache="float32"), expected)
    assert_same(evaluate_cache(tmp_path / "folder", detectors=["all"], progress=False), expected)
    assert_same(run(model, batch_size=56), expected)

    assert_same(run_in_shares(model, tmp_path / "shares"), expected)


def run_in_shares(model, out, run=run):
    """The result of two processes, each of which is started as often as need be."""
    shares = {"out": out, "wait_seconds": 0}
    with pytest.raises(Interrupted, match="process 1 of 2 has not finished fitting"):
        run(model, process=(0, 2), **shares)
    # Statistics of a second pass come after those of the first of all processes.
    for _ in range(3):
        for process in ((1, 2), (0, 2)):
            try:
                result = run(model, process=process, **shares)
            except (Interrupted, Unfinished):
                continue
    return result


def test_inner_layers(tmp_path):
    """The same, but from a cache, which holds no network."""

    def run_inner(model, **options):
        images = inner_reference.make_images(300, np.float32)
        return evaluate(
            model,
            images[:40],
            {"far": 3 * images[40:70]},
            detectors=INNER,
            fit=(images[70:], np.arange(230) % inner_reference.CLASSES),
            progress=False,
            **{"batch_size": 16, **options},
        )

    params = inner_reference.make_params(np.float32)
    images = inner_reference.make_images(2, np.float32)
    model = from_apply(inner_reference.network, params, images)
    expected = run_inner(model)
    assert list(expected.metrics) == INNER
    assert_same(run_inner(model, out=tmp_path / "folder", cache="float32"), expected)
    assert_same(run_inner(model, batch_size=56), expected)
    with pytest.raises(ValueError, match="holds only the outputs"):
        evaluate_cache(tmp_path / "folder", detectors=INNER, progress=False)
    assert_same(run_in_shares(model, tmp_path / "shares", run_inner), expected)
