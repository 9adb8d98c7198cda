"""The command line, `gradnorm-jax`."""

import logging
import sys
from typing import Annotated, Any

import rich.console
import rich.progress
import tyro

from gradnorm_jax.cli.demo import DemoOptions, run_demo
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.run import EvaluateOptions, run

Command = (
    Annotated[DemoOptions, tyro.conf.subcommand("demo")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; what is wrong with its input ends it with one sentence and status 2."""
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
                return progress.track(items, total=total, description=description)

            match options:
                case DemoOptions():
                    evaluation = run_demo(options, track)
                case EvaluateOptions():
                    evaluation = run(options, track)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"gradnorm-jax: {error}")
    console.print(report.to_rich(evaluation))
    for remark in report.remarks(evaluation):
        console.print(remark, highlight=False)
    console.print(f"Results: {options.out}", highlight=False)
