"""Charts hold what was measured, whatever its range."""

import re

import numpy as np
import pytest

from gradnorm_jax.metrics import auroc
from gradnorm_jax.reporting import charts, svg
from gradnorm_jax.reporting.markup import element, to_html
from tests.test_plots import EXTREME


@pytest.mark.parametrize("name", EXTREME)
def test_any_range_is_drawn(name):
    scores = dict(
        zip(("ID", "far"), (np.asarray(x, np.float64) for x in EXTREME[name]), strict=True)
    )
    drawn = [
        charts.histogram("msp", scores, "far", 0.5),
        charts.roc("msp", scores, {}),
        charts.scatter("u", scores, scores, ("a", "b"), 1.0),
    ]
    for chart in drawn:
        numbers = [float(x) for x in re.findall(r"-?\d+\.\d", to_html(chart.drawing))]
        assert numbers
        assert np.isfinite(numbers).all()
        assert max(numbers) <= svg.WIDTH
        assert min(numbers) >= 0


def test_the_curve_has_the_area_and_its_intervals_cover():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(1, size=3000), rng.normal(size=2000)
    curve = charts.roc_curve(id_scores, ood_scores)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(
        auroc(id_scores, ood_scores), abs=1e-3
    )
    assert len(curve.fpr) <= 242
    for rate, (low, high) in ((curve.tpr, curve.tpr_interval.T), (curve.fpr, curve.fpr_interval.T)):
        assert ((low <= rate) & (rate <= high)).all()
    # 1950 of 3000 pass: Clopper and Pearson at the level sqrt(0.95), by scipy.stats.binomtest.
    at = np.flatnonzero(np.isclose(curve.tpr, 0.65))
    assert curve.tpr_interval[at[0]] == pytest.approx([0.6301816, 0.6694476], abs=1e-6)


def test_ticks_are_round():
    def ticks(low, high):
        return svg._ticks(svg.Axis("", low, high))

    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-3.1, 17) == [0, 5, 10, 15]
    assert [svg._number(x) for x in (-1e5, 2.5e-7, 0.1675, 20.0)] == [
        "-1e5",
        "2.5e-7",
        "0.1675",
        "20",
    ]


def test_markup_is_escaped_and_printable():
    made = element("p", "<b>\x00\u202e", element("i", "&"), '"tail"', title='"><script>\n')
    assert to_html(made) == (
        '<!DOCTYPE html>\n<p title="&quot;&gt;<script&gt;\\n">'
        '&lt;b&gt;\\x00\\u202e<i>&amp;</i>"tail"</p>\n'
    )
