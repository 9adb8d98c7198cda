"""The command line, `gradnorm-jax`."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated

import jax
import rich.console
import tyro

from gradnorm_jax.cli.data import PrepareOptions, run_prepare
from gradnorm_jax.cli.demo import DemoOptions, run_demo
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.records import Interrupted, Unfinished

Command = (
    Annotated[DemoOptions, tyro.conf.subcommand("demo")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[PrepareOptions, tyro.conf.subcommand("data")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command.

    What is wrong with its input ends it with one sentence and status 1. Status 75 (EX_TEMPFAIL)
    means: run the same command again, and it resumes.
    """
    logging.captureWarnings(True)
    # Modules of the user's own are named on the command line.
    sys.path.insert(0, os.getcwd())
    options = tyro.cli(
        Command,
        prog="gradnorm-jax",
        description="Gradient-space out-of-distribution detection; --version tells the version.",
        args=arguments,
    )
    try:
        match options:
            case DemoOptions():
                result = run_demo(options)
            case EvaluateOptions():
                with stop_on_sigterm() as should_stop:
                    result = run_evaluate(options, should_stop=should_stop)
            case PrepareOptions():
                print(run_prepare(options))
                return
    except Unfinished as share:
        print(f"gradnorm-jax: {share}", file=sys.stderr)
        return
    except Interrupted as stop:
        print(f"gradnorm-jax: {stop}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"gradnorm-jax: {_describe(error)}")
    console = rich.console.Console()
    console.print(report.to_rich(result))
    for line in (*report.data_sets(result), *report.remarks(result), f"Results: {options.out}"):
        console.print(line, highlight=False, markup=False)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM has come."""
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(error: Exception) -> str:
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return str(error)
    # The runtime's errors go on for pages.
    reason = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in reason:
        return f"the devices are out of memory; give a smaller --batch-size: {reason}"
    return f"the devices or their runtime have failed: {reason}"
