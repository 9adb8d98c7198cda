"""The command that reports on finished runs."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gradnorm_jax.reporting import Format, report

_ENDINGS: dict[str, Format] = {
    ".html": "html",
    ".htm": "html",
    ".md": "markdown",
    ".csv": "csv",
    ".tex": "latex",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Report on finished runs: a page for people, or tables for papers and programs.

    The page is one file that loads nothing and runs no script. It shows tables with the best and
    the statistically tied marked, charts, and the images that a detector is most wrong about. Of
    several runs it compares each with the first, on the same inputs.

    Example: gradnorm-jax report runs/1 runs/2 -o report.html

    Attributes:
        runs: the --out of `gradnorm-jax evaluate`, or of the demo; NAME=PATH gives it a name.
        out: file for the report, which is overwritten; by default it is printed.
        format: html, markdown, csv or latex (booktabs); by default what the ending of --out says,
            or else markdown.
        pictures: how many images of each data set to show.
        detector: whose mistakes they are; by default gradnorm, or else the first of the run.
        source: where the images of a data set are now, if they have moved, each as NAME=SPEC, where
            NAME is ID or that of an OOD set, and SPEC as for `gradnorm-jax evaluate`.
        data_dir: where `tfds:` finds prepared data sets; by default where tfds puts them.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    format: Format | None = None
    pictures: int = 12
    detector: str | None = None
    source: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    data_dir: str | Path | None = None


def run_report(options: ReportOptions) -> None:
    """Writes or prints the report; see `gradnorm_jax.report` for what is raised."""
    text = report(
        *options.runs,
        format=options.format or _find_format(options.out),
        pictures=options.pictures,
        detector=options.detector,
        sources=dict(_parse(spec) for group in options.source for spec in group),
        data_dir=options.data_dir,
    )
    if options.out is None:
        sys.stdout.write(text)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, "utf-8")


def _find_format(out: Path | None) -> Format:
    if out is None:
        return "markdown"
    if out.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"cannot tell the format of {out}: end it in {', '.join(_ENDINGS)}, or give --format"
        )
    return _ENDINGS[out.suffix.lower()]


def _parse(spec: str) -> tuple[str, str]:
    name, equals, path = spec.partition("=")
    if not (name and equals and path):
        raise ValueError(f"cannot read --source {spec!r}; write NAME=PATH")
    return name, path
