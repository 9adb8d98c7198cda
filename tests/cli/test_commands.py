"""What all commands have in common."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from typing import get_args

import pytest

import gradnorm_jax as gj
from gradnorm_jax import cli
from gradnorm_jax.cli.commands import Command, parse
from tests.cli.test_score import calibrate_command

COMMANDS = {facts.name: options for options, facts in map(get_args, get_args(Command))}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_is_understood(name, capsys):
    text = " ".join(inspect.getdoc(COMMANDS[name]).split("\n\nAttributes")[0].split())
    (example,) = re.findall(r"Example: gradnorm-jax (.*)", text)
    assert example.startswith(f"{name} ")
    assert type(parse(shlex.split(example)).command) is COMMANDS[name]
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert f"Example: gradnorm-jax {example}" in " ".join(capsys.readouterr().out.split())


def test_the_list_of_commands_is_short(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"• {name} " in printed for name in COMMANDS)
    assert "Example: " not in printed
    assert len(printed.splitlines()) < 50


@pytest.mark.parametrize(
    ("line", "verbose"),
    [
        ("-v score d.safetensors a.png", True),
        ("score d.safetensors a.png --verbose", True),
        ("score --trust mine -v d.safetensors a.png", True),
        ("score d.safetensors a.png --weights=-v", False),
        ("score d.safetensors -- -v", False),
        ("--verbose data prepare dtd", True),
    ],
)
def test_v_is_an_option_of_every_command_and_no_value(line, verbose):
    parsed = parse(line.split())
    assert parsed.verbose == verbose
    assert ("-v" in str(parsed.command)) == (not verbose)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["models", "--nonsense"], ["convert"]])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "gradnorm-jax" in err


def test_json_is_for_programs(make_folder, tmp_path, capsys):
    path, folder = tmp_path / "d.safetensors", make_folder(40)
    cli.main(calibrate_command(path, folder, "--detector", "energy", "--json"))
    told = json.loads(capsys.readouterr().out)
    calibrated = gj.load_detector(path, trust=["tests.cli.test_score"])
    assert told["file"] == str(path)
    assert told["threshold"] == pytest.approx(float(calibrated.threshold), rel=1e-6)
    interval = calibrated.tpr_interval
    assert told["tpr_interval"] == [interval.low, interval.high]
    evaluate = ["evaluate", "--model", "tests.cli.test_score:build", "--out", str(tmp_path / "out")]
    sets = ["--id", str(folder), "--ood", f"far={folder}", "--detectors", "energy"]
    cli.main([*evaluate, *sets, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "metrics.json").read_bytes())


@pytest.mark.slow
def test_what_is_said_without_a_terminal_and_with_v(make_folder, tmp_path):
    line = calibrate_command(tmp_path / "d.safetensors", make_folder(30), "--detector", "energy")
    quiet, verbose = (
        subprocess.run(
            [sys.executable, "-m", "gradnorm_jax", *line, *flags], capture_output=True, text=True
        )
        for flags in ([], ["-v"])
    )
    assert quiet.stderr == ""
    assert quiet.stdout == verbose.stdout
    assert f"gradnorm-jax {gj.__version__}, python " in verbose.stderr
    assert "calibration: 30 inputs scored, 0 excluded" in verbose.stderr


@pytest.mark.slow
def test_bash_completes_commands_and_options(tmp_path):
    script = tmp_path / "completion"
    command = [sys.executable, "-m", "gradnorm_jax", "--tyro-write-completion", "bash", script]
    subprocess.run(command, check=True)
    ask = f"""
        source {script}
        for words in "sc" "watch --fail" "score --format j"; do
            COMP_WORDS=(gradnorm-jax $words)
            COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            _tyro_gradnorm_jax
            echo "${{COMPREPLY[@]}}"
        done"""
    said = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["score", "--fail-on-drift", "jsonl"]
