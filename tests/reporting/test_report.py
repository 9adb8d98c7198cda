"""What a report of one run says, in every format."""

import base64
import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import gradnorm_jax as gj
from gradnorm_jax.evaluation.saved import load_run
from gradnorm_jax.evaluation.tables import ALL_METRICS, HEADLINE
from gradnorm_jax.reporting import background
from gradnorm_jax.text import printable, to_utf8
from tests.reporting.runs import Page, numbered, run, write_images

EVIL = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'.png",
    "a\nb\r\t\x1b[31m\x00".replace("\0", ""),
    "\u202egnp.exe.png",
    "caf\udce9.png",
    "{{ 7 * 7 }} & &lt; &#60; ]]> <!-- --.png",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on images with evil names, some of which are no images, and its result."""
    folder = tmp_path_factory.mktemp("reports")
    far = write_images(folder / "far", numbered(12), seed=1)
    near = folder / "near"
    write_images(near, [name.replace("/", "") + "x.png" for name in EVIL], seed=2)
    (near / f"{EVIL[0].replace('/', '')}.png").write_bytes(b"no image")
    (near / f"{EVIL[3]}.txt").write_bytes(b"")
    id_data = write_images(folder / "id", numbered(20))
    sets = {"far": far, "near": near}
    result = run(folder / "run", id_data, sets, batch_size=8, max_undecodable=0.5)
    return folder / "run", result


@pytest.fixture(scope="module")
def page(finished):
    return Page(gj.report(finished[0]))


def test_a_saved_run_is_what_was_evaluated(finished):
    folder, result = finished
    saved = load_run(folder)
    assert saved.result.metrics == result.metrics
    assert saved.result.best == result.best
    assert (saved.result.accuracy, saved.result.warnings) == (result.accuracy, result.warnings)
    for name, table in result.tables.items():
        assert saved.result.tables[name].ids == table.ids
        assert saved.result.tables[name].excluded == table.excluded
        assert list(saved.result.tables[name].scores) == list(table.scores)
        product = saved.recorded["feature_norm"][name] * saved.recorded["residual_norm"][name]
        np.testing.assert_allclose(product, table.scores["gradnorm"], rtol=1e-5)
        np.testing.assert_array_equal(saved.recorded["msp"][name], table.scores["msp"])
    assert saved.journal.sources["far"] == f"folder:{(folder.parent / 'far').resolve()}"
    (session,) = saved.journal.sessions
    assert {k: p.batches for k, p in session.passes.items()} == {
        "ID": 3, "far": 2, "near": 1, "metrics": 6,
    }  # fmt: skip


def test_the_page_loads_and_runs_nothing(page):
    assert not {"script", "iframe", "object", "link", "base", "form"} & set(page.tags)
    for tag, attributes in page.attributes:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        if "href" in attributes:
            assert re.fullmatch(r"#section-\d+-\d+", attributes["href"])
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/")
    (style,) = page.text["style"]
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for t, a in page.attributes if t == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    anchors = {a["id"] for _, a in page.attributes if "id" in a}
    assert {a["href"][1:] for t, a in page.attributes if t == "a"} == anchors


def test_evil_names_are_only_text(page):
    assert page.tags.count("img") == 12 + 12 + 6
    captions = page.text["figcaption"]
    for name in EVIL:
        shown = printable(to_utf8(name.replace("/", "") + "x.png"))
        assert any(caption.startswith(shown) for caption in captions)
    everything = page.text["html"][0]
    assert all(character.isprintable() or character == "\n" for character in everything)


def test_numbers_are_those_of_the_json(finished, page):
    folder, _ = finished
    stored = json.loads((folder / "metrics.json").read_bytes())
    headline, full = page.tables[:2]
    assert [row[0] for row in headline[2:]] == list(stored["metrics"])
    for detector, *cells in headline[2:]:
        by_set = [*stored["metrics"][detector].values()]
        values = [x[m]["value"] for x in by_set for m in HEADLINE.values()]
        values += [stored["averages"][detector][metric] for metric in HEADLINE.values()]
        assert cells == [f"{100 * value:.2f}" for value in values]
    for detector, name, *cells in full[1:]:
        found = [stored["metrics"][detector][name][m] for m in ALL_METRICS.values()]
        assert cells == [
            f"{100 * x['value']:.2f} [{100 * x['low']:.2f}, {100 * x['high']:.2f}]" for x in found
        ]
    best = load_run(folder).result.best
    leaders = [x for by_metric in best.values() for b in by_metric.values() for x in b.leaders()]
    assert len(page.marked) == len(leaders) > 0


def test_pictures_are_those_of_the_extreme_scores(finished, page):
    folder, result = finished
    sources = [a["src"] for tag, a in page.attributes if tag == "img"]
    for name, first, sign in (("far", 0, -1), ("ID", 18, 1)):
        table = result.tables[name]
        order = np.argsort(sign * table.scores["gradnorm"], kind="stable")[:12]
        captions = [c for c in page.text["figcaption"] if "score" in c][first : first + 12]
        for row, caption, source in zip(order, captions, sources[first:], strict=False):
            assert caption.startswith(f"{table.ids[row]}score {table.scores['gradnorm'][row]:.4g}")
            image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
            file = folder.parent / name.lower() / table.ids[row]
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(file)))


def test_the_rest_is_there(page):
    titles = page.text["h3"]
    assert titles == [
        "Results", "What gradnorm is most wrong about", "Scores", "Factors of GradNorm",
        "All metrics", "Excluded images", "Timing", "Configuration", "How to cite",
    ]  # fmt: skip
    # By detector: two histograms and the ROC curves; the score against confidence but for msp.
    assert page.tags.count("svg") == 3 * 3 + 2 + 1
    everything = page.text["body"][0]
    assert "near: 2 files" in everything
    assert "the file is not an image of a known format" in everything
    assert "huang2021gradnorm" in everything
    assert "energy: Liu et al. 2020, arXiv:2010.03759" in everything
    assert ["jax", gj.evaluation.run_config.versions()["jax"]] in [
        row for table in page.tables for row in table
    ]


def test_markdown_has_the_same_tables(finished):
    folder, result = finished
    text = gj.report(folder, format="markdown")
    value = f"{100 * result['energy', 'far'].auroc.value:.2f}"
    assert value in text
    for title in ("Results", "All metrics", "Excluded images", "Timing", "How to cite"):
        assert f"### {title}" in text
    assert "\\<script\\>" in text
    assert "<script" not in text.replace("\\<script", "")
    assert all(character.isprintable() or character == "\n" for character in text)


def test_csv_has_every_number(finished, tmp_path):
    folder, result = finished
    shutil.copytree(folder, tmp_path / "=x")
    rows = list(csv.DictReader(io.StringIO(gj.report(tmp_path / "=x", format="csv"))))
    assert len(rows) == 3 * 2 * 6
    for row in rows:
        assert row["run"] == "'=x"
        estimate = getattr(result[row["detector"], row["ood_set"]], row["metric"])
        assert [float(row[k]) for k in ("value", "low", "high")] == list(vars(estimate).values())
        best = result.best[row["ood_set"]].get(row["metric"])
        assert row["is_best"] == ("" if best is None else str(row["detector"] in best.leaders()))
        assert (row["id_inputs"], row["minus_first_run"]) == ("20", "")


def test_latex_is_balanced_and_escaped(finished):
    folder, result = finished
    text = gj.report(f"50%_[*]$&#{{}}~^\\={folder}", format="latex")
    assert r"50\%\_{[}{*}]\$\&\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}." in text
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 2
    value = f"{100 * result['msp', 'far'].auroc.value:.2f}"
    row = next(line for line in text.splitlines() if line.startswith("msp &"))
    assert value in row
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    assert columns == "l" + 9 * "r"
    assert row.count("&") == 9


def test_images_that_moved_are_found_where_they_are_said_to_be(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    journal = tmp_path / "run" / "journal" / "00000-of-00001.json"
    journal.write_text("not JSON")
    text = Page(gj.report(tmp_path / "run", pictures=2))
    assert "Where the images of far are is not recorded: give --source far=PATH." in text.text["p"]
    assert "img" not in text.tags
    other = write_images(tmp_path / "other", numbered(5), seed=3)
    sources = {"far": str(folder.parent / "far"), "ID": str(other), "near": "nowhere"}
    text = Page(gj.report(tmp_path / "run", pictures=12, sources=sources))
    assert any("near cannot be read again" in each for each in text.text["p"])
    missing = text.text["div"]
    assert sum("index" in each and "range" in each for each in missing) > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.remove(f / "metrics.json"), "holds a run that is not finished"),
        (lambda f: os.remove(f / "config.json"), "holds no run"),
        (lambda f: (f / "metrics.json").write_text("[" * 9999), r"metrics\.json is not that of"),
        (lambda f: (f / "metrics.json").write_text('{"excluded": 1}'), r"metrics\.json is not"),
        (lambda f: (f / "config.json").write_text('{"versions": {}}'), r"config\.json is damaged"),
        (
            lambda f: spoil(f / "metrics.json", "auroc", "x"),
            r"metrics\.json is not that of its run",
        ),
    ],
)
def test_what_is_damaged_is_named(finished, tmp_path, damage, message):
    shutil.copytree(finished[0], tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gj.report(tmp_path / "run")


def spoil(path, metric, value):
    content = json.loads(path.read_bytes())
    content["metrics"]["msp"]["far"][metric]["value"] = value
    path.write_text(json.dumps(content))


def test_wrong_arguments(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(ValueError, match="no run is given"):
        gj.report()
    with pytest.raises(ValueError, match="format must be one of html"):
        gj.report(folder, format="pdf")
    with pytest.raises(ValueError, match="two runs are called run: give them names"):
        gj.report(folder, folder)
    with pytest.raises(ValueError, match=r"no scores of 'odin' in .*; detectors: msp, energy"):
        gj.report(folder, detector="odin")
    with pytest.raises(OSError, match="is a file, not the folder of a run"):
        gj.report(folder / "config.json")


def test_a_run_without_what_reports_need_says_so(finished, tmp_path):
    """As older versions have written them, and runs of arrays."""
    shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_bytes())
    del config["recorded"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "run" / "journal")
    text = Page(gj.report(tmp_path / "run"))
    assert text.tags.count("svg") == 3 * 3
    assert any(each.startswith("Not recorded") for each in text.text["p"])
    schema = pyarrow.parquet.read_schema(tmp_path / "run/scores/far.parquet/000000.parquet")
    recorded = {"feature_norm", "residual_norm"}
    assert {*schema.names[4:]} == {"msp", "energy", "gradnorm"} | recorded


def test_rectifiers_are_cited_too():
    assert background._papers("react(percentile=0.9)+gradnorm(select=all,ord=3)") == [
        "Sun et al. 2021, arXiv:2111.12797",
        "Huang et al. 2021, arXiv:2110.00218",
    ]
    assert background._papers("mine") == ["your own"]
