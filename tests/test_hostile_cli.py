"""How the command ends: signals, closed pipes, errors foreseen and not, names with markup."""

import lzma
import os
import signal
import subprocess
import sys
import zlib

import pytest

from gradnorm_jax.cli import commands, main
from gradnorm_jax.cli.endings import Signals

COMMAND = [sys.executable, "-m", "gradnorm_jax"]


def fail_with(error):
    def fail(*arguments, **options):
        raise error

    return fail


DEMO = ["demo", "--out", "nowhere"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("wrong"), "gradnorm-jax: wrong"),
        (ValueError("a\x1b[31m\nb\udce9"), r"gradnorm-jax: a\x1b[31m\nb\xe9"),
        (OSError("no space"), "gradnorm-jax: no space"),
        (EOFError(), "gradnorm-jax: EOFError"),
        (
            MemoryError(),
            "gradnorm-jax: the memory does not suffice; give a smaller --batch-size (MemoryError)",
        ),
        (OverflowError("too large"), "gradnorm-jax: too large"),
        (RecursionError("too deep"), "gradnorm-jax: too deep"),
        (zlib.error("bad stream"), "gradnorm-jax: bad stream"),
        (lzma.LZMAError("bad data"), "gradnorm-jax: bad data"),
        (BrokenPipeError("another pipe"), "gradnorm-jax: another pipe"),
    ],
)
def test_what_is_foreseen_is_one_sentence(monkeypatch, error, sentence):
    monkeypatch.setattr(commands, "run_demo", fail_with(error))
    with pytest.raises(SystemExit) as ended:
        main(DEMO)
    assert ended.value.code == sentence


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (commands.Interrupted("stopped"), 75, "gradnorm-jax: stopped"),
        (ZeroDivisionError(), 70, "this should not have happened; please report the lines above"),
    ],
)
def test_other_ends(monkeypatch, capsys, error, status, sentence):
    monkeypatch.setattr(commands, "run_demo", fail_with(error))
    with pytest.raises(SystemExit) as ended:
        main(DEMO)
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert sentence in said
    assert ("Traceback" in said) == (status == 70)


def test_sigterm_waits_once_it_is_polled_for():
    signals = Signals()
    before = signal.getsignal(signal.SIGTERM)
    with signals.installed():
        assert not signals.should_stop()
        signal.raise_signal(signal.SIGTERM)
        assert signals.should_stop()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("signal_number", "status", "word"),
    [(signal.SIGTERM, 75, "stopped"), (signal.SIGINT, 130, "interrupted")],
)
def test_signals_in_the_first_seconds(signal_number, status, word, tmp_path):
    # A slow import, in short sleeps: a signal that comes just before one does not end it.
    sleep = "import time\nprint(flush=True)\nfor _ in range(600):\n    time.sleep(0.1)\n"
    (tmp_path / "tyro.py").write_text(sleep)
    code = "from gradnorm_jax.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal_number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert said == f"gradnorm-jax: {word}; run the same command again to resume\n"


def test_a_closed_pipe_is_silent():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 141


def test_the_help_of_a_command_is_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["data", "prepare", "--help"])
    printed = capsys.readouterr().out
    assert "usage: gradnorm-jax data prepare [-h]" in printed
    assert "--manual-dir" in printed
