"""The studies of the paper: their rows, and what is said of the paper's figures."""

import importlib
from pathlib import Path

import numpy as np
import pytest

import gradnorm_jax as gj
from experiments.paper import study, table_1
from gradnorm_jax.evaluation.records import ID

FOLDER = Path(study.__file__).parent
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
    rows = {"GradNorm": "gradnorm", "MSP": "msp", "Energy": "energy"}
    published = {("GradNorm", "Textures"): (fpr, auroc), ("MSP", "Textures"): (200, 200)}
    text = study.describe("A study", result, rows, published)
    assert text.count("other data") == 2
    monkeypatch.setattr(study, "PAPER_SIZES", {ID: 20, "Textures": 20})
    text = study.describe("A study", result, rows, published)
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


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.py")) if p.stem != "study"])
def test_the_detectors_of_the_rows_exist(name):
    module = importlib.import_module(f"experiments.paper.{name}")
    rows = getattr(module, "ROWS", None) or {
        pattern: f"gradnorm(select={pattern})" for pattern in module.LayersOptions(out="").layers
    }
    assert len(gj.parse_detectors(list(rows.values()))) == len(rows)
