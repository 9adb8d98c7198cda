"""Runs in rounds that a kill cannot spoil: checkpoints, metrics of each round, and their plot."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from experiments.training import Metrics, TrainState
from gradnorm_jax.extras import needs_extra

OPTIONS, HISTORY = "options.json", "history.jsonl"


def run_rounds(
    state: TrainState,
    rounds: int,
    run_round: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    folder: Path,
    options: Any,
) -> TrainState:
    """Trains in rounds, and resumes after the last one that a killed run has kept.

    After each round `folder` holds a checkpoint and a line of metrics. Where a round is a function
    of the state and its number alone, a resumed run is an undisturbed one, bit for bit.

    Args:
        state: before the first round; it also says how arrays are spread over devices.
        rounds: how many.
        run_round: `(state, round) -> (state, metrics)`.
        folder: new, empty, or of the same run.
        options: a dataclass of all that decides the results.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    claim(folder, options)
    # Not asynchronous: the next round may be given the arrays to overwrite.
    manager = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=manager) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
        history = read_history(folder)[:done]
        for number in range(done, rounds):
            state, metrics = run_round(state, number)
            history.append({"round": number + 1, **metrics})
            print(f"{number + 1}/{rounds}", *_format(metrics), sep="  ", flush=True)
            _write(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in history))
            checkpoints.save(number + 1, args=ocp.args.StandardSave(state))
    return state


def claim(folder: Path, options: Any) -> None:
    """Writes the options of a run into its folder, or raises ValueError if it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / OPTIONS
    mine = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    if not file.exists():
        _write(file, json.dumps(mine, indent=2))
        return
    theirs = json.loads(file.read_text())
    if differing := [key for key in mine | theirs if mine.get(key) != theirs.get(key)]:
        listed = ", ".join(f"{key} {theirs.get(key)!r}" for key in differing)
        raise ValueError(f"{folder} holds a run with {listed}; choose another --out")


def read_history(folder: Path) -> list[dict[str, float]]:
    """The metrics of each round so far."""
    file = folder / HISTORY
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plot_history(folder: Path) -> None:
    """Draws `curve.png`: loss and accuracies, and AUROCs of all detectors and sets, by round."""
    with needs_extra("plots", "plots"):
        from matplotlib.figure import Figure

    history = read_history(folder)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(name for line in history for name in line):
        if name in ("round", "seconds") or name.endswith("/fpr95"):
            continue
        points = [(line["round"], line[name]) for line in history if name in line]
        panels[int("/" in name)].plot(*zip(*points, strict=True), label=name, marker=".")
    for panel in panels:
        panel.set_xlabel("Round")
        if panel.lines:
            panel.legend(fontsize="x-small")
    figure.savefig(folder / "curve.png", dpi=150)


def _format(metrics: Metrics) -> Iterator[str]:
    for name, value in metrics.items():
        yield f"{name} {value:.4f}"


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)
