import pytest

from gradnorm_jax.evaluation.journal import Journal, keep_journal, read_journal
from gradnorm_jax.evaluation.storage import open_folder
from gradnorm_jax.progress import no_progress


def compute(folder, passes, process=(0, 1), sources=None):
    with keep_journal(folder, sources or {"ID": None, "far": "x"}, process, no_progress) as track:
        for name, count in passes.items():
            assert list(track(range(count), name, None)) == list(range(count))


@pytest.fixture
def folder(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("scores/ID.parquet/000000.parquet", b"")
    return folder


def test_sessions_add_up_over_processes(folder):
    compute(folder, {"ID": 3, "metrics": 2})
    compute(folder, {"far": 1}, sources={"ID": None, "far": "y"})
    compute(folder, {"ID": 2}, process=(1, 2))
    journal = read_journal(folder)
    assert journal.sources == {"far": "x"}
    found = [{k: p.batches for k, p in session.passes.items()} for session in journal.sessions]
    assert found == [{"ID": 3, "metrics": 2}, {"far": 1}, {"ID": 2}]
    assert all(p.seconds >= 0 for session in journal.sessions for p in session.passes.values())


def test_what_is_interrupted_is_noted(folder):
    def interrupted():
        with keep_journal(folder, {"ID": None}, (0, 1), no_progress) as track:
            for item in track(range(9), "ID", None):
                if item == 4:
                    raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        interrupted()
    (session,) = read_journal(folder).sessions
    assert session.passes["ID"].batches == 5


def test_nothing_computed_is_no_session(folder, tmp_path):
    compute(folder, {"metrics": 3})
    assert read_journal(folder) == Journal({}, [])
    compute(open_folder(tmp_path / "empty"), {"ID": 3})
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"1", b"\xff", b"[" * 9999, b'{"sessions": [1]}', b'{"sources": []}',
     b'{"sessions": [{"started": 1, "passes": {"ID": {"seconds": "x", "batches": 1}}}]}'],
)  # fmt: skip
def test_a_damaged_journal_is_as_good_as_none(folder, content):
    folder.write("journal/00000-of-00001.json", content)
    assert read_journal(folder) == Journal({}, [])
    compute(folder, {"ID": 1})
    assert len(read_journal(folder).sessions) == 1
