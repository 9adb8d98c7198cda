"""The commands, and what they print."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import rich.console
import tyro

from gradnorm_jax.cli.calibrate import CalibrateOptions, run_calibrate
from gradnorm_jax.cli.data import PrepareOptions, run_prepare
from gradnorm_jax.cli.demo import DemoOptions, run_demo
from gradnorm_jax.cli.detectors import DetectorsOptions, run_detectors
from gradnorm_jax.cli.endings import tell
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.cli.models import ConvertOptions, ModelsOptions, run_convert, run_models
from gradnorm_jax.cli.score import ScoreOptions, run_score
from gradnorm_jax.cli.watch import WatchOptions, run_watch
from gradnorm_jax.evaluation import report
from gradnorm_jax.evaluation.records import Interrupted, Unfinished
from gradnorm_jax.text import printable

Command = (
    Annotated[DemoOptions, tyro.conf.subcommand("demo")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[CalibrateOptions, tyro.conf.subcommand("calibrate")]
    | Annotated[ScoreOptions, tyro.conf.subcommand("score")]
    | Annotated[WatchOptions, tyro.conf.subcommand("watch")]
    | Annotated[PrepareOptions, tyro.conf.subcommand("data prepare")]
    | Annotated[ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[ModelsOptions, tyro.conf.subcommand("models")]
    | Annotated[DetectorsOptions, tyro.conf.subcommand("detectors")]
)


def run(arguments: list[str], should_stop: Callable[[], bool] = bool) -> None:
    """Runs the command of these arguments, and prints what comes of it."""
    logging.captureWarnings(True)
    # Modules of the user's own are named on the command line.
    sys.path.insert(0, os.getcwd())
    if arguments[:2] == ["data", "prepare"]:
        arguments = ["data prepare", *arguments[2:]]
    options = tyro.cli(
        Command,
        prog="gradnorm-jax",
        description="Gradient-space out-of-distribution detection; --version tells the version.",
        args=arguments,
    )
    try:
        match options:
            case DemoOptions():
                _show(run_demo(options), options.out)
            case EvaluateOptions():
                _show(run_evaluate(options, should_stop=should_stop), options.out)
            case CalibrateOptions():
                for line in run_calibrate(options).splitlines():
                    print(printable(line))
            case ScoreOptions():
                if status := run_score(options):
                    sys.exit(status)
            case WatchOptions():
                if status := run_watch(options):
                    sys.exit(status)
            case PrepareOptions():
                print(printable(run_prepare(options)))
            case ConvertOptions():
                print(printable(run_convert(options)))
            case ModelsOptions():
                run_models(options)
            case DetectorsOptions():
                run_detectors(options)
    except Unfinished as share:
        tell(str(share))
    except Interrupted as stop:
        tell(str(stop))
        sys.exit(os.EX_TEMPFAIL)


def _show(result: report.Result, out: str | Path) -> None:
    console = rich.console.Console()
    console.print(report.to_rich(result))
    for line in (*report.data_sets(result), *report.remarks(result), f"Results: {out}"):
        console.print(printable(line), highlight=False, markup=False)
