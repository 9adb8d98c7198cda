import re
import shlex
from pathlib import Path

import pytest
import tyro

import gradnorm_jax as gj
from gradnorm_jax.cli import main
from gradnorm_jax.cli.report import ReportOptions
from tests.documentation import code_of
from tests.reporting.runs import numbered, run, write_images

DOCS = Path(__file__).parents[2] / "docs" / "reports.md"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    id_data = write_images(folder / "id", numbered(9))
    far = write_images(folder / "far", numbered(7), seed=1)
    run(folder / "run", id_data, {"far": far}, detectors=["msp"])
    return folder / "run"


@pytest.mark.parametrize(
    ("ending", "format"),
    [("html", "html"), ("HTM", "html"), ("md", "markdown"), ("csv", "csv"), ("tex", "latex")],
)
def test_the_ending_says_the_format(finished, tmp_path, ending, format):  # noqa: A002
    out = tmp_path / "new" / f"report.{ending}"
    main(["report", str(finished), "-o", str(out)])
    assert out.read_text("utf-8") == gj.report(finished, format=format)


def test_without_a_file_it_is_printed(finished, capsys):
    main(["report", f"mine={finished}", "--format", "csv"])
    assert capsys.readouterr().out == gj.report(f"mine={finished}", format="csv")
    main(["report", str(finished), "--source", f"ID={finished}", "--pictures", "1"])
    printed = capsys.readouterr().out
    assert printed == gj.report(finished, format="markdown", pictures=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere holds no run; give the --out of evaluate"),
        (["x", "-o", "report.pdf"], "cannot tell the format of report.pdf: end it in .html"),
        (["x", "--source", "ID"], "cannot read --source 'ID'; write NAME=PATH"),
        (["x", "--pictures", "-1"], "pictures must be at least 0, got -1"),
        ([], "no run is given; give the folder of at least one"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    assert ended.value.code.startswith(f"gradnorm-jax: {sentence}")


def test_the_commands_in_the_docs_are_understood(finished, tmp_path, monkeypatch):
    text = DOCS.read_text("utf-8")
    commands = re.findall(r"^ {4}gradnorm-jax report (.*)", text, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        options = tyro.cli(ReportOptions, args=shlex.split(command, comments=True))
        assert options.runs[0].endswith("runs/1")
    (tmp_path / "runs").mkdir()
    for number in "12":
        (tmp_path / "runs" / number).symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    names = {"gj": gj}
    for block in code_of(DOCS):
        exec(block, names)
    assert names["page"].startswith("<!DOCTYPE html>")
    assert r"\toprule" in names["table"]
