"""The command line, `gradnorm-jax`."""

import logging
import os
import sys
from typing import Annotated, Any, NoReturn

import jax
import rich.console
import rich.progress
import tyro

from gradnorm_jax.cli.data import PrepareOptions, run_prepare
from gradnorm_jax.cli.demo import DemoOptions, run_demo
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.hosts import Interrupted, preemption
from gradnorm_jax.evaluation.peers import leave
from gradnorm_jax.evaluation.run import EvaluateOptions, run

Command = (
    Annotated[DemoOptions, tyro.conf.subcommand("demo")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[PrepareOptions, tyro.conf.subcommand("data")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command.

    What is wrong with its input ends it with one sentence and status 1. Status 75 (EX_TEMPFAIL)
    asks for the same line to be started again, which goes on where the evaluation was: SIGTERM has
    ended it at the next step with everything saved, or another of its processes is gone.
    """
    logging.captureWarnings(True)
    options = tyro.cli(Command, prog="gradnorm-jax", args=arguments)
    console = rich.console.Console()
    try:
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=rich.console.Console(stderr=True),
        ) as progress:

            def track(items: Any, description: str, total: int) -> Any:
                # Of several processes only the first prints.
                if jax.process_index():
                    return items
                return progress.track(items, total=total, description=description)

            match options:
                case DemoOptions():
                    evaluation = run_demo(options, track)
                case EvaluateOptions():
                    with preemption() as stop_here:
                        evaluation = run(options, track, stop_here)
                case PrepareOptions():
                    print(run_prepare(options))
                    return
    except Interrupted as stop:
        print(f"gradnorm-jax: {stop}", file=sys.stderr)
        _end(os.EX_TEMPFAIL)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _end(f"gradnorm-jax: {_describe(error)}")
    if jax.process_index():
        return
    console.print(report.to_rich(evaluation))
    for remark in report.remarks(evaluation):
        console.print(remark, highlight=False)
    console.print(f"Results: {options.out}", highlight=False)


def _describe(error: Exception) -> str:
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return str(error)
    # The runtime's errors go on for pages.
    reason = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in reason:
        return f"the devices are out of memory; give a smaller --batch-size: {reason}"
    return f"the devices or their runtime have failed: {reason}"


def _end(status: int | str) -> NoReturn:
    """Exits with a status, or with status 1 and a sentence."""
    if not jax.distributed.is_initialized():
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    leave(status)
