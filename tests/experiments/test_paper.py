"""The studies of the paper: their rows, and what is said of the paper's figures."""

import json

import numpy as np
import pytest

import gradnorm_jax as gj
from experiments.paper import (
    factors,
    networks,
    norms,
    study,
    table_1,
    targets,
    temperatures,
)
from gradnorm_jax.evaluation.records import ID

RNG = np.random.default_rng(0)


class Network:
    """A linear classifier of inputs that are its features."""

    params = RNG.normal(size=(6, 4)).astype(np.float32)

    @staticmethod
    def function(params, inputs):
        return inputs @ params


@pytest.fixture(scope="module")
def result():
    inputs = np.abs(RNG.normal(size=(40, 6))).astype(np.float32)
    model = gj.from_apply(Network.function, Network.params, inputs[:2])
    return gj.evaluate(model, inputs[:20], {"Textures": inputs[20:]}, detectors=["gradnorm", "msp"])


def test_figures_are_compared_where_the_data_are_as_many(result, monkeypatch):
    auroc = 100 * result["gradnorm", "Textures"].auroc.value
    fpr = 100 * result["gradnorm", "Textures"].fpr_at_95_tpr_id_positive.value
    detectors = {"GradNorm": "gradnorm", "MSP": "msp", "Energy": "energy"}
    rows = [study.Row(name, result, detector) for name, detector in detectors.items()]
    published = {("GradNorm", "Textures"): (fpr, auroc), ("MSP", "Textures"): (200, 200)}
    text = study.describe("A study", rows, published)
    assert text.count("other data") == 2
    monkeypatch.setattr(study, "PAPER_SIZES", {ID: 20, "Textures": 20})
    text = study.describe("A study", rows, published)
    found = {line.split(" |")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert f"paper {fpr:.2f} / {auroc:.2f}: reproduced" in found["GradNorm"]
    assert "paper 200.00 / 200.00: differs" in found["MSP"]
    assert "not run here" in found["Energy"]


def test_averages_of_the_papers_figures_are_the_papers():
    averages = {row: np.mean(figures, axis=0) for row, figures in table_1.FIGURES.items()}
    np.testing.assert_allclose(averages["GradNorm"], (54.70, 86.31), atol=0.005)
    np.testing.assert_allclose(averages["MSP"], (76.96, 79.29), atol=0.0051)
    np.testing.assert_allclose(averages["ODIN"], (72.99, 82.56), atol=0.0051)
    np.testing.assert_allclose(averages["Mahalanobis"], (81.69, 62.02), atol=0.0051)
    np.testing.assert_allclose(averages["Energy"], (71.03, 82.74), atol=0.0051)


@pytest.mark.parametrize("module", [factors, norms, table_1, targets, temperatures])
def test_the_detectors_of_the_rows_exist(module):
    assert len(gj.parse_detectors(list(module.ROWS.values()))) == len(module.ROWS)


def test_networks_are_evaluated_one_by_one_and_shown_together(tmp_path, make_folder):
    options = networks.NetworksOptions(
        networks=tuple(f"tests.evaluation.networks:{name}" for name in ("build", "build_wide")),
        preprocess="tests.evaluation.networks:PREPROCESS",
        detectors=(("energy", "gradnorm"),),
        id=str(make_folder(8)),
        ood=((f"other={make_folder(6, seed=1)}",),),
        out=tmp_path,
    )
    networks.main(options)
    lines = (tmp_path / "study.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| tests")]
    expected = []
    for name in options.networks:
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
        for detector in ("energy", "gradnorm"):
            auroc = 100 * metrics[detector]["other"]["auroc"]["value"]
            expected.append((f"| {name}, {detector} | ", f" / {auroc:.2f} ["))
    for row, (start, auroc) in zip(rows, expected, strict=True):
        assert row.startswith(start)
        assert auroc in row
    assert len({auroc for _, auroc in expected}) > 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"networks": ()}, "give at least one"),
        ({"networks": ("a=b",), "model": "a"}, "takes the place of --model"),
        ({"networks": ("a=b/w.npz", "a=c/w.npz")}, "two networks a=w"),
    ],
)
def test_networks_that_cannot_be_told(given, message):
    with pytest.raises(ValueError, match=message):
        networks.evaluations(networks.NetworksOptions(out="runs", **given))
