"""All detectors of the table by every way through the evaluation: one result."""

import numpy as np
import pytest

from gradnorm_jax.detectors import parse_detectors
from gradnorm_jax.evaluation.evaluate import evaluate, evaluate_cache
from gradnorm_jax.evaluation.records import Interrupted, Unfinished
from tests.evaluation import networks
from tests.evaluation.networks import inputs, labels

pytestmark = pytest.mark.slow


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
        np.testing.assert_allclose(
            result.scores[cell], scores, rtol=2e-4, atol=2e-5 * np.abs(scores).max(), err_msg=cell
        )


def test_memory_folder_cache_and_processes(tmp_path):
    model = networks.build()
    expected = run(model)
    assert list(expected.metrics) == [d.name for d in parse_detectors(["all"])]

    assert_same(run(model, out=tmp_path / "folder", cache="float32"), expected)
    assert_same(evaluate_cache(tmp_path / "folder", detectors=["all"], progress=False), expected)
    assert_same(run(model, batch_size=56), expected)

    shares = {"out": tmp_path / "shares", "wait_seconds": 0}
    with pytest.raises(Interrupted, match="process 1 of 2 has not finished fitting"):
        run(model, process=(0, 2), **shares)
    # Statistics of a second pass come after those of the first of all processes.
    for _ in range(3):
        for process in ((1, 2), (0, 2)):
            try:
                result = run(model, process=process, **shares)
            except (Interrupted, Unfinished):
                continue
    assert_same(result, expected)
