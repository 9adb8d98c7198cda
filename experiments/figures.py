"""The figure of the README, from a run of `gradnorm-jax evaluate --detectors all`.

python experiments/figures.py runs/densenet --out docs/figures/factors.svg
"""

from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import tyro

import gradnorm_jax as gj
from gradnorm_jax.evaluation.saved import load_run


def main(
    run: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    detectors: tuple[str, ...] = ("feature_norm", "residual_norm", "gradnorm"),
    sets: tuple[str, ...] = ("ID", "cifar100", "textures", "mnist"),
) -> None:
    """Draws histograms of scores, detectors by OOD sets.

    Args:
        run: the folder of a finished run.
        out: the file, .svg or .png.
        detectors: one row each.
        sets: ID, and the OOD set of each column.
    """
    scores = load_run(run).result.scores
    grid = {detector: {name: scores[detector, name] for name in sets} for detector in detectors}
    # Nothing in the file depends on when it was written.
    mpl.rcParams["svg.hashsalt"] = "gradnorm_jax"
    out.parent.mkdir(parents=True, exist_ok=True)
    gj.plots.histogram_grid(grid).savefig(out, metadata={"Date": None}, dpi=150)


if __name__ == "__main__":
    tyro.cli(main)
