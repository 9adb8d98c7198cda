import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from gradnorm_jax import plots

rng = np.random.default_rng(0)
ID, OOD = rng.normal(1, 1, 300), rng.normal(0, 1, 200)

EXTREME = {
    "constant": ([1, 1], [1]),
    "zeros": ([0], [0]),
    "one against one": ([2.0], [-3.0]),
    "a large constant": ([1e6] * 3, [1e6] * 2),
    "far from the origin": (1e6 + 1e-9 * ID, 1e6 + 1e-9 * OOD),
    "one ulp apart": ([1e6], [np.nextafter(1e6, 2e6)]),
    "tiny": (1e-30 * ID, 1e-30 * OOD),
    "denormal": ([1e-45], [0.0]),
    "huge": (1e37 * ID, 1e37 * OOD),
    "an outlier": ([*ID, 1e30], OOD),
}


def drawn(figure):
    assert isinstance(figure, Figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
    return figure.axes


def heights(axis):
    return [patch.get_data().values for patch in axis.patches]


@pytest.mark.parametrize("name", EXTREME)
def test_every_score_is_drawn_whatever_the_range(name):
    id_scores, ood_scores = EXTREME[name]
    (axis,) = drawn(plots.histograms(id_scores, {"textures": ood_scores}))
    for fractions, count in zip(heights(axis), (len(id_scores), len(ood_scores)), strict=True):
        assert fractions.sum() == pytest.approx(1)
        assert np.allclose(fractions * count, np.round(fractions * count))
    drawn(plots.histogram_grid({"msp": {"ID": id_scores, "textures": ood_scores}}))
    drawn(plots.roc(id_scores, {"textures": ood_scores}))


def test_histograms_have_a_panel_for_each_set():
    axes = drawn(plots.histograms(ID, {"ID": ID, "svhn": OOD}, title="gradnorm"))
    assert axes[0].get_title() == "ID, AUROC 50.00 %"
    labels = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert labels == ["ID", "svhn"]


def test_a_grid_of_detectors_by_sets():
    scores = {name: {"ID": ID, "svhn": OOD, "dtd": OOD - 1} for name in ("msp", "gradnorm")}
    axes = drawn(plots.histogram_grid(scores, titles={("msp", "dtd"): "mine"}))
    titles = [axis.get_title() for axis in axes]
    assert titles[1] == "mine"
    assert titles[0].startswith("msp, AUROC ")
    assert titles[2].startswith("gradnorm, AUROC ")
    assert len(titles) == 4


def test_roc_by_hand():
    (axis,) = drawn(plots.roc([3, 2, 2, 1], {"set": [2, 0]}))
    passed, found = axis.lines[0].get_data()
    np.testing.assert_allclose(passed, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_allclose(found, [0, 0.25, 0.75, 1, 1])
    assert axis.lines[0].get_label() == "set, AUROC 75.00 %"


def test_names_are_shown_as_they_are():
    (axis,) = drawn(plots.roc(ID, {"_a$b_{c$": OOD}))
    assert "_a\\$b_{c\\$" in axis.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize("plot", [plots.histograms, plots.roc])
def test_nothing_to_draw_and_bad_scores(plot):
    with pytest.raises(ValueError, match="at least one OOD set"):
        plot(ID, {})
    with pytest.raises(ValueError, match="must be finite"):
        plot(ID, {"svhn": [1.0, np.nan]})


def test_grids_that_cannot_be_drawn():
    for scores in ({}, {"msp": {"ID": ID}}):
        with pytest.raises(ValueError, match="at least one OOD set"):
            plots.histogram_grid(scores)
    with pytest.raises(ValueError, match="scores of the same sets"):
        plots.histogram_grid({"msp": {"ID": ID, "a": OOD}, "energy": {"ID": ID, "b": OOD}})


def test_without_matplotlib_the_error_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import gradnorm_jax as gj
try:
    gj.plots.roc([1.0], {"a": [0.0]})
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'gradnorm-jax[plots]'" in result.stdout
