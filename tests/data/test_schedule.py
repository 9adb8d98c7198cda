import pytest

from gradnorm_jax.data.schedule import BatchSchedule


@pytest.mark.parametrize(
    ("length", "taken"),
    [(0, [0]), (1, [0]), (3, [0]), (4, [0, 1]), (5, [0, 1]), (8, [0, 1, 2])],
)
def test_the_last_batch_is_the_one_that_is_not_full(length, taken):
    assert BatchSchedule(4).taken(length) == taken


def test_by_hand():
    schedule = BatchSchedule(2, batches_per_part=3, process=1, processes=2)
    assert schedule.part_size == 6
    assert [schedule.part(batch) for batch in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert schedule.taken(20) == [3, 4, 5, 9, 10]
    assert BatchSchedule(2, 3, 1, 2, done=frozenset([1])).taken(20) == [9, 10]
    assert BatchSchedule(2, 3, 1, 2, done=frozenset([0, 2])).taken(20) == [3, 4, 5, 9, 10]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("batches_per_part", [1, 4])
def test_every_batch_is_taken_once(processes, batches_per_part):
    for length in range(30):
        taken = [
            batch
            for process in range(processes)
            for batch in BatchSchedule(3, batches_per_part, process, processes).taken(length)
        ]
        assert sorted(taken) == list(range(length // 3 + 1))


@pytest.mark.parametrize("fields", [(0,), (1, 0), (1, 1, -1, 2), (1, 1, 2, 2), (1, 1, 0, 0)])
def test_schedules_that_cannot_be(fields):
    with pytest.raises(ValueError, match=r"BatchSchedule\(batch_size=.* cannot be: sizes are at"):
        BatchSchedule(*fields)
