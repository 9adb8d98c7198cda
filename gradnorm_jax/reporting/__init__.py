"""Reports of finished runs: a page for people, tables for papers and programs."""

import os
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Literal, get_args

from gradnorm_jax.evaluation.saved import SavedRun, load_run
from gradnorm_jax.extras import needs_extra

Format = Literal["html", "markdown", "csv", "latex"]


def report(
    *runs: str | os.PathLike[str],
    format: Format = "html",  # noqa: A002
    pictures: int = 12,
    detector: str | None = None,
    sources: Mapping[str, str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> str:
    """A report of finished runs, and of several side by side.

    >>> pathlib.Path("report.html").write_text(gj.report("runs/1", "runs/2"), "utf-8")

    As HTML it is one page that loads nothing and runs no script: tables with the best and the
    statistically tied marked, both conventions of FPR95, histograms, ROC curves, scatter plots, the
    images that a detector is most wrong about, what was excluded, and where the numbers come from.
    Markdown has the same but for charts and pixels, LaTeX (booktabs) the tables, CSV all metrics.

    Several runs are compared by paired tests on the same inputs, which are known by their ids;
    where a data set has other inputs, that is said, and nothing is tested.

    Args:
        *runs: the folders that `evaluate` wrote (`out`), each a path, a URL (`gs://`), or
            `NAME=PATH` for a name other than the folder's.
        format: what it is written in.
        pictures: how many images of each data set are shown.
        detector: whose mistakes they are; by default gradnorm, or else the first.
        sources: where the images are by data set, as for `open_source`, if they have moved.
        data_dir: where `tfds:` finds prepared data sets.

    Returns:
        The report.

    Raises:
        ValueError: an argument is wrong, or a run's file is damaged.
        FileNotFoundError: there is no such run, or it is not finished.
        OSError: a file cannot be read.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    if pictures < 0:
        raise ValueError(f"pictures must be at least 0, got {pictures}")
    with needs_extra("data", "reports"):
        from gradnorm_jax.reporting.chapters import Choices, all_chapters
        from gradnorm_jax.reporting.latex import latex
        from gradnorm_jax.reporting.long_table import to_csv
        from gradnorm_jax.reporting.markdown import markdown
        from gradnorm_jax.reporting.page import page
    loaded = _load(runs)
    if format == "csv":
        return to_csv(loaded)
    choices = Choices(pictures, detector, dict(sources or {}), data_dir, drawn=format == "html")
    chapters = list(all_chapters(loaded, choices))
    title = f"Out-of-distribution detection: {', '.join(loaded)}"
    match format:
        case "html":
            return page(chapters, title)
        case "markdown":
            return markdown(chapters, title)
        case "latex":
            return latex(chapters)


def _load(runs: Iterable[str | os.PathLike[str]]) -> dict[str, SavedRun]:
    """The runs by name: the one given, or that of the folder."""
    loaded: dict[str, SavedRun] = {}
    for run in runs:
        address = os.fspath(run)
        name, equals, path = address.partition("=")
        if not (equals and name and path) or os.path.exists(address):
            name, path = "", address
        saved = load_run(path)
        name = name or _name(saved.address)
        if name in loaded:
            raise ValueError(f"two runs are called {name}: give them names, as in NAME={path}")
        loaded[name] = saved
    if not loaded:
        raise ValueError("no run is given; give the folder of at least one")
    return loaded


def _name(address: str) -> str:
    path = PurePath(address if "://" in address else os.path.abspath(os.path.expanduser(address)))
    # The demo's results are in a folder of that name.
    return (path.parent if path.name == "results" else path).name or address
