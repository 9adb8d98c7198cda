import json

import numpy as np

from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.evaluate import ID, Evaluation
from gradnorm_jax.evaluation.folder import open_folder
from gradnorm_jax.evaluation.results import write_results
from gradnorm_jax.evaluation.table import Excluded, ScoreTable


def test_every_excluded_file_is_listed_even_if_their_ids_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot_histograms", lambda evaluation, file: None)
    excluded = [Excluded("notes.txt", "a"), Excluded("1.png", "b", 0), Excluded("1.png", "c", 3)]
    empty = np.zeros(0, np.int64)
    table = ScoreTable(empty, [], empty, empty, {}, excluded)
    evaluation = Evaluation({ID: table}, None, {}, {}, excluded[1:])
    write_results(open_folder(tmp_path), evaluation)
    assert json.loads((tmp_path / "metrics.json").read_text())["excluded"] == {
        "ID": [
            {"id": "notes.txt", "reason": "a"},
            {"id": "1.png", "reason": "b", "position": 0},
            {"id": "1.png", "reason": "c", "position": 3},
        ],
        "fit": [
            {"id": "1.png", "reason": "b", "position": 0},
            {"id": "1.png", "reason": "c", "position": 3},
        ],
    }
