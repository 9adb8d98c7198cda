import dataclasses
import io
import json

import numpy as np
import pytest
import rich.console

from gradnorm_jax import metrics
from gradnorm_jax.data.stream import Excluded
from gradnorm_jax.evaluation import report, tables, views
from gradnorm_jax.evaluation.records import ID, ScoreTable
from gradnorm_jax.evaluation.result import Result, remarks
from gradnorm_jax.text import escape_markdown, printable


def make_table(shift, detectors, excluded=(), count=30):
    scores = np.random.default_rng(0).normal(shift, size=(len(detectors), count))
    empty = np.zeros(count, np.int64)
    by_name = dict(zip(detectors, scores.astype(np.float32), strict=True))
    return ScoreTable(empty, [str(i) for i in range(count)], empty, empty, by_name, excluded)


def make_result(detectors=("msp", "gradnorm"), sets=("far", "near"), excluded=(), **options):
    by_set = {ID: make_table(0, detectors, excluded)}
    by_set |= {name: make_table(1.0 + i, detectors) for i, name in enumerate(sets)}
    cells = {
        d: {s: metrics.evaluate_scores(by_set[ID].scores[d], by_set[s].scores[d]) for s in sets}
        for d in detectors
    }
    return Result(by_set, cells, **options)


def test_metrics_by_detector_and_set():
    result = make_result()
    assert result["gradnorm", "near"] is result.metrics["gradnorm"]["near"]
    assert list(result.scores) == [(d, s) for s in (ID, "far", "near") for d in ("msp", "gradnorm")]
    np.testing.assert_array_equal(result.scores["msp", ID], result.tables[ID].scores["msp"])


@pytest.mark.parametrize("key", [("odin", "far"), ("msp", "svhn"), ("far", "msp"), ("msp", ID)])
def test_a_wrong_key_lists_the_right_ones(key):
    with pytest.raises(KeyError, match=r"detectors: msp, gradnorm; OOD sets: far, near"):
        make_result()[key]


def test_print_shows_the_table_and_what_it_leaves_out():
    result = make_result(
        accuracy=0.91734, not_run={"odin": "it needs more"}, fit_excluded=[Excluded("a.png", "bad")]
    )
    text = str(result)
    for detector, cells in result.metrics.items():
        assert detector in text
        for cell in cells.values():
            assert f"{100 * cell.auroc.value:.2f}" in text
    assert "ID: 30 inputs, top-1 accuracy 91.73 %" in text
    assert "odin was not run: it needs more." in text
    assert "fit: 1 files were excluded: a.png (bad)." in text


def test_averages_by_hand():
    cells = make_result().metrics["msp"]
    mean = (cells["near"].auroc.value + cells["far"].auroc.value) / 2
    assert tables.averages(cells.values())["auroc"] == pytest.approx(mean)


EVIL = "<script>alert(1)</script>"
MARKUP = "[bold red]x[/bold red]"


def test_names_are_only_text():
    excluded = [Excluded(EVIL, MARKUP, 0), Excluded("a/[/b].jpg", "x", 1)]
    result = make_result(
        detectors=(EVIL, MARKUP, "a|b"), excluded=excluded, not_run={EVIL * 2: "<b>"}
    )
    page = result._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<tr>") == 5
    assert MARKUP in page
    text = str(result)
    assert EVIL in text
    assert MARKUP in text
    assert "a/[/b].jpg (x)" in text
    markdown = report.summary(result)
    assert "a\\|b" in markdown


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[31mred.png", "a\rb\tc\x00.png"])
def test_control_characters_reach_neither_terminal_nor_report(name):
    result = make_result(excluded=[Excluded(name, "bad", 0)])
    for text, shown in (
        (str(result), printable),
        (report.summary(result), escape_markdown),
        (result._repr_html_(), printable),
    ):
        assert shown(name) in text
        assert all(character.isprintable() for character in text.replace("\n", ""))


def test_undecodable_files_are_listed_before_those_with_other_names():
    excluded = [Excluded(f"{i}.txt", "by name") for i in range(20)]
    excluded += [Excluded("1.png", "broken", 1)]
    (line,) = remarks(make_result(excluded=excluded))
    assert line.startswith("ID: 21 files were excluded: 1.png (broken); 0.txt (by name); ")
    assert line.endswith("; and 16 more.")


def test_the_report_in_markdown():
    result = make_result(accuracy=0.5)
    text = report.summary(result)
    assert "| Detector | far | near | Average |" in text
    cell = result["gradnorm", "near"]
    assert f"{100 * cell.auroc.value:.2f} [{100 * cell.auroc.low:.2f}" in text
    assert "- ID: 30 inputs, top-1 accuracy 50.00 %" in text


def test_every_excluded_file_is_listed_even_if_their_ids_are_equal():
    excluded = [Excluded("notes.txt", "a"), Excluded("1.png", "b", 0), Excluded("1.png", "c", 3)]
    result = make_result(excluded=excluded, fit_excluded=excluded[1:])
    listed = json.loads(json.dumps(report.to_dict(result)))["excluded"]
    assert listed["ID"] == [
        {"id": "notes.txt", "reason": "a"},
        {"id": "1.png", "reason": "b", "position": 0},
        {"id": "1.png", "reason": "c", "position": 3},
    ]
    assert listed["fit"] == listed["ID"][1:]


def make_clear_result():
    """`good` is better than `fair` and `bad` on `far`; on `near` none is better than another."""
    rng = np.random.default_rng(1)
    shifts = {"good": 3.0, "fair": 1.5, "bad": 0.0}
    empty = np.zeros(200, np.int64)

    def table(shift_of):
        scores = {d: (rng.normal(size=200) - shift_of(d)).astype(np.float32) for d in shifts}
        return ScoreTable(empty, [str(i) for i in range(200)], empty, empty, scores, ())

    by_set = {ID: table(lambda d: 0), "far": table(shifts.get), "near": table(lambda d: 0)}
    cells = {
        d: {
            name: metrics.evaluate_scores(by_set[ID].scores[d], by_set[name].scores[d])
            for name in ("far", "near")
        }
        for d in shifts
    }
    return Result(by_set, cells)


def test_the_best_and_all_that_are_not_worse_are_marked():
    result = make_clear_result()
    values = {
        (d, name): [
            f"{100 * getattr(result[d, name], metric).value:.2f}"
            for metric in tables.HEADLINE.values()
        ]
        for d in result.metrics
        for name in ("far", "near")
    }
    text, markdown, page = str(result), report.summary(result), result._repr_html_()
    for (d, name), numbers in values.items():
        leads = name == "near" or d == "good"
        show = (lambda x: f"**{x}**") if leads else str
        assert f"| {' / '.join(map(show, numbers))} |" in markdown
        show = (lambda x: f"<b>{x}</b>") if leads else str
        assert f"<td>{' / '.join(map(show, numbers))}</td>" in page
        assert f"{' '.join((' *'[leads] + x) for x in numbers)}  " in text
    for shown in (text.replace("\n", " "), markdown, page):
        assert "not significantly worse at the 5 % level" in shown
    assert "significantly" not in str(make_result(detectors=("msp",)))


def test_tests_as_json():
    result = make_clear_result()
    best = json.loads(json.dumps(report.to_dict(result)))["best"]["far"]["auroc"]
    assert best["detector"] == "good"
    assert list(best["against"]) == ["fair", "bad"]
    test = result.compare("good", "bad")["far"]["auroc"]
    assert test.difference == result["good", "far"].auroc.value - result["bad", "far"].auroc.value
    expected = dataclasses.asdict(test) | {"holm_p_value": 2 * test.p_value}
    assert best["against"]["bad"] == pytest.approx(expected)
    assert report.to_dict(make_result(detectors=("msp",)))["best"] == {}


def test_compare_names_the_detectors_there_are():
    with pytest.raises(KeyError, match="'odin'; detectors: good, fair, bad"):
        make_clear_result().compare("good", "odin")


@pytest.mark.parametrize(("width", "tables_shown"), [(80, 3), (160, 1)])
def test_fifty_detectors_take_a_line_each(width, tables_shown):
    names = [f"gradnorm(ord={i})" for i in range(50)]
    result = make_result(names, ("iNaturalist", "SUN", "Places", "Textures"))
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(views.to_rich(result.headline))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for name in names:
        assert sum(line.strip().startswith(name) for line in lines) == tables_shown
    assert len(lines) < (50 + 6) * tables_shown + 3


def test_metrics_as_json():
    result = make_result()
    found = json.loads(json.dumps(report.to_dict(result)))
    assert found["inputs"] == {"ID": 30, "far": 30, "near": 30}
    for detector, cells in result.metrics.items():
        for name, cell in cells.items():
            auroc = found["metrics"][detector][name]["auroc"]
            assert auroc["value"] == cell.auroc.value
            assert auroc["low"] <= auroc["value"] <= auroc["high"]
        averages = [cell.auroc.value for cell in cells.values()]
        assert found["averages"][detector]["auroc"] == pytest.approx(np.mean(averages))
