"""Runs side by side: only the same inputs are compared, and they are found by their ids."""

import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax.evaluation.saved import load_run
from gradnorm_jax.metrics import delong_test, fpr_test, holm
from gradnorm_jax.reporting.side_by_side import differences, leaders, match_inputs
from tests.evaluation.networks import inputs
from tests.reporting.runs import Page, numbered, run, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    id_data = write_images(folder / "id", numbered(20))
    far = write_images(folder / "far", numbered(12), seed=1)
    run(folder / "a", id_data, {"far": far})
    run(folder / "b", id_data, {"far": far, "other": far}, seed=1, detectors=["msp", "energy"])
    more = write_images(folder / "more", numbered(13), seed=1)
    run(folder / "c", id_data, {"far": more}, seed=2)
    return folder


def test_differences_are_those_of_paired_tests(folder):
    runs = {name: load_run(folder / name) for name in "ab"}
    orders, remarks = match_inputs(runs)
    assert remarks == []
    found = differences(runs, orders)
    assert [(x.run, x.detector, x.ood_set, x.metric) for x in found] == [
        ("b", detector, "far", metric)
        for metric in ("auroc", "fpr_at_95_tpr_id_positive")
        for detector in ("msp", "energy")
    ]
    for number, test in enumerate((delong_test, fpr_test)):
        expected = [
            test(*(runs[r].result.tables[s].scores[d] for r in "ba" for s in ("ID", "far")))
            for d in ("msp", "energy")
        ]
        of_metric = found[2 * number : 2 * number + 2]
        assert [x.comparison for x in of_metric] == expected
        np.testing.assert_array_equal(
            [x.holm_p_value for x in of_metric], holm([x.p_value for x in expected])
        )
    assert set(leaders(runs, orders)["far", "auroc"]) <= {
        *(("a", d) for d in ("msp", "energy", "gradnorm")), *(("b", d) for d in ("msp", "energy")),
    }  # fmt: skip


def test_inputs_are_matched_by_id_whatever_their_order(folder):
    runs = {name: load_run(folder / name) for name in "ab"}
    table = runs["b"].result.tables["ID"]
    turned = table._replace(
        ids=table.ids[::-1],
        scores={d: each[::-1] for d, each in table.scores.items()},
        predictions=table.predictions[::-1],
    )
    expected = differences(runs, match_inputs(runs)[0])
    runs["b"].result.tables["ID"] = turned
    assert differences(runs, match_inputs(runs)[0]) == expected


def test_other_inputs_are_not_tested_and_that_is_said(folder):
    runs = {name: load_run(folder / name) for name in "ac"}
    orders, (remark,) = match_inputs(runs)
    assert remark == (
        "far of a and of c are other inputs, so nothing is tested: 1 are in only the latter "
        "(012.png)."
    )
    assert differences(runs, orders) == []
    assert leaders(runs, orders) == {}
    page = Page(gj.report(folder / "a", folder / "c", pictures=0))
    assert any(remark in item for item in page.text["li"])
    assert "No run shares a detector and the inputs with a." in page.text["p"]


def test_inputs_without_names_need_the_same_content(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        run(tmp_path / name, inputs(20), {"far": inputs(9, seed)}, preprocess=None)
    runs = {name: load_run(tmp_path / name) for name in "ab"}
    orders, (remark,) = match_inputs(runs)
    assert ("b", "ID") in orders
    assert ("b", "far") not in orders
    assert remark.startswith("far of a and of b may be other inputs, so nothing is tested: cont")
    runs = {name: load_run(tmp_path / name) for name in "ac"}
    assert [x.comparison.difference for x in differences(runs, match_inputs(runs)[0])] == [0.0] * 6


def test_the_page_compares(folder):
    page = Page(gj.report(f"one={folder / 'a'}", f"two={folder / 'b'}", pictures=0))
    assert page.text["h2"] == ["Runs side by side", "one", "two"]
    assert [row[:2] for row in page.tables[0][2:]] == [
        ["one", "msp"], ["one", "energy"], ["one", "gradnorm"], ["two", "msp"], ["two", "energy"],
    ]  # fmt: skip
    assert [row[:3] for row in page.tables[1][1:]] == [["two", d, "far"] for d in ("msp", "energy")]
    assert "weights_sha256" in [row[0] for row in page.tables[2]]
