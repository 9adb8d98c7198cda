"""The commands, and what they print."""

import dataclasses
import functools
import inspect
import logging
import operator
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

import jax
import rich.console
import tyro

import gradnorm_jax
from gradnorm_jax.cli.calibrate import CalibrateOptions, run_calibrate
from gradnorm_jax.cli.data import PrepareOptions, run_prepare
from gradnorm_jax.cli.demo import DemoOptions, run_demo
from gradnorm_jax.cli.detectors import DetectorsOptions, run_detectors
from gradnorm_jax.cli.endings import tell
from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.cli.export import ExportOptions, run_export
from gradnorm_jax.cli.models import ConvertOptions, ModelsOptions, run_convert, run_models
from gradnorm_jax.cli.report import ReportOptions, run_report
from gradnorm_jax.cli.score import ScoreOptions, run_score
from gradnorm_jax.cli.watch import WatchOptions, run_watch
from gradnorm_jax.evaluation.records import Interrupted, Unfinished
from gradnorm_jax.evaluation.report import to_dict
from gradnorm_jax.evaluation.result import Result, data_sets, remarks
from gradnorm_jax.evaluation.run_config import versions
from gradnorm_jax.evaluation.storage import to_json
from gradnorm_jax.evaluation.views import to_rich
from gradnorm_jax.text import printable

Command = (
    Annotated[DemoOptions, tyro.conf.subcommand("demo")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[ReportOptions, tyro.conf.subcommand("report")]
    | Annotated[CalibrateOptions, tyro.conf.subcommand("calibrate")]
    | Annotated[ScoreOptions, tyro.conf.subcommand("score")]
    | Annotated[WatchOptions, tyro.conf.subcommand("watch")]
    | Annotated[ExportOptions, tyro.conf.subcommand("export")]
    | Annotated[PrepareOptions, tyro.conf.subcommand("data prepare")]
    | Annotated[ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[ModelsOptions, tyro.conf.subcommand("models")]
    | Annotated[DetectorsOptions, tyro.conf.subcommand("detectors")]
)
_DESCRIPTION = """Gradient-space out-of-distribution detection.

--version tells the version.

Exit status: 0, done; 1, something is wrong with the input; 2, with the command line; 75, stopped,
and the same command resumes; 130, Ctrl-C. score and watch tell others of their own.
"""

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[Options]):
    """What a command line asks for.

    Attributes:
        command: with --help, each tells its options and an example.
        verbose: log what is done on stderr; before the command or after it.
    """

    command: Annotated[Options, tyro.conf.arg(name="")]
    verbose: Annotated[tyro.conf.CascadeSubcommandArgs[bool], tyro.conf.arg(aliases=["-v"])] = False


def parse(arguments: list[str]) -> CommandLine[Any]:
    """The command of these arguments, and its options."""
    first = next((i for i, each in enumerate(arguments) if not each.startswith("-")), 0)
    if arguments[first : first + 2] == ["data", "prepare"]:
        arguments = [*arguments[:first], "data prepare", *arguments[first + 2 :]]
    commands = dict(_name_and_options(each) for each in get_args(Command))
    shown = Command if {*arguments[first : first + 1]} & commands.keys() else _in_brief(commands)
    return tyro.cli(
        CommandLine[shown],  # type: ignore[valid-type]
        prog="gradnorm-jax",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _name_and_options(command: Any) -> tuple[str, type]:
    options, facts = get_args(command)
    return facts.name, options


def _in_brief(commands: Mapping[str, type]) -> Any:
    """The commands with the first paragraph of their help alone, for the list of them."""
    described: list[Any] = []
    for name, options in commands.items():
        first, *_ = (inspect.getdoc(options) or "").split("\n\n")
        described.append(Annotated[options, tyro.conf.subcommand(name, description=first)])
    return functools.reduce(operator.or_, described)


def run(arguments: list[str], should_stop: Callable[[], bool] = bool) -> None:
    """Runs the command of these arguments, and prints what comes of it."""
    logging.captureWarnings(True)
    # Modules of the user's own are named on the command line.
    sys.path.insert(0, os.getcwd())
    asked = parse(arguments)
    if asked.verbose:
        _log_what_is_done()
    try:
        match options := asked.command:
            case DemoOptions():
                _show(run_demo(options), options.out)
            case EvaluateOptions():
                result = run_evaluate(options, should_stop=should_stop)
                if options.json:
                    print(to_json(to_dict(result)).decode(), end="")
                else:
                    _show(result, options.out)
            case ReportOptions():
                run_report(options)
            case CalibrateOptions():
                for line in run_calibrate(options).splitlines():
                    print(printable(line))
            case ScoreOptions():
                if status := run_score(options):
                    sys.exit(status)
            case WatchOptions():
                if status := run_watch(options):
                    sys.exit(status)
            case ExportOptions():
                for line in run_export(options).splitlines():
                    print(printable(line))
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


def _log_what_is_done() -> None:
    # By force, because imported packages have handlers of their own.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    about = {"gradnorm-jax": gradnorm_jax.__version__, **versions()}
    devices = ", ".join(map(str, jax.devices()))
    logging.getLogger(__name__).info("%s; on %s", ", ".join(map(" ".join, about.items())), devices)


def _show(result: Result, out: str | Path) -> None:
    console = rich.console.Console()
    console.print(to_rich(result.headline))
    for line in (*data_sets(result), *remarks(result), f"Results: {out}"):
        console.print(printable(line), highlight=False, markup=False)
