import json

from gradnorm_jax import cli
from gradnorm_jax.detectors import DETECTORS


def test_every_detector_is_listed(capsys):
    cli.main(["detectors"])
    text = capsys.readouterr().out
    cli.main(["detectors", "--json"])
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == list(DETECTORS)
    for record in records:
        assert record["name"] in text
        assert record["paper"]


def test_what_a_detector_reads_and_learns(capsys):
    cli.main(["detectors", "--json"])
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert records["mahalanobis"]["learns"] == ["moments", "class sums"]
    assert records["energy"] == {
        "name": "energy",
        "space": "output",
        "needs": "logits",
        "learns": [],
        "options": {"temperature": 1.0},
        "required": [],
        "paper": "Liu et al. 2020, arXiv:2010.03759",
    }
