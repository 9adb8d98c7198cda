import numpy as np

from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation.records import (
    ScoreTable,
    concatenate,
    count_positions,
)


def make_table(positions, excluded=()):
    positions = np.array(positions)
    return ScoreTable(
        positions,
        [str(i) for i in positions],
        positions * 10,
        positions % 2,
        {"score": positions / 2},
        [Excluded(str(i), "bad", i) for i in excluded],
    )


def test_tables_one_after_the_other():
    table = concatenate([make_table([0, 1, 3], excluded=[2]), make_table([5], excluded=[4])])
    assert table.ids == ["0", "1", "3", "5"]
    np.testing.assert_array_equal(table.positions, [0, 1, 3, 5])
    np.testing.assert_array_equal(table.labels, [0, 10, 30, 50])
    np.testing.assert_array_equal(table.predictions, [0, 1, 1, 1])
    np.testing.assert_array_equal(table.scores["score"], [0, 0.5, 1.5, 2.5])
    assert [each.position for each in table.excluded] == [2, 4]
    assert count_positions(table) == 6
    ignored = table._replace(excluded=[*table.excluded, Excluded("notes.txt", "no image")])
    assert count_positions(ignored) == 6
