import numpy as np
import pytest

from gradnorm_jax import metrics
from gradnorm_jax.evaluation.figures import compare
from gradnorm_jax.evaluation.hosts import Interrupted
from gradnorm_jax.evaluation.passes import Execution
from gradnorm_jax.evaluation.table import ScoreTable


def make_table(shift):
    scores = np.random.default_rng(0).normal(shift, size=(2, 30)).astype(np.float32)
    empty = np.zeros(0, np.int64)
    return ScoreTable(empty, [], empty, empty, dict(zip("ab", scores, strict=True)), [])


TABLES = {"far": make_table(2), "near": make_table(0.5)}


def test_every_detector_on_every_set():
    shown = []

    def track(items, description, total):
        for item in items:
            shown.append((description, total))
            yield item

    found = compare(["b", "a"], make_table(0), TABLES, Execution(track=track))
    assert list(found) == ["b", "a"]
    assert shown == [("figures", 4)] * 4
    for detector, cells in found.items():
        assert list(cells) == ["far", "near"]
        for name, cell in cells.items():
            scores = make_table(0).scores[detector], TABLES[name].scores[detector]
            assert cell == metrics.evaluate_scores(*scores)


def test_it_can_be_stopped_after_any_cell():
    calls = iter([False, True])
    with pytest.raises(Interrupted, match="start the same line again"):
        compare(["a", "b"], make_table(0), TABLES, Execution(stop_here=lambda: next(calls)))
    assert not list(calls)
