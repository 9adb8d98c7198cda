"""How often `gradnorm_jax.calibration.update_drift` raises a false alarm, and how soon a true one.

    python experiments/drift_simulation.py

Scores are standard normal; tied ones are rounded to halves. The first table has the percentage of
in-distribution streams that are ever rejected, with its standard error, beside that of the same
test with p-values against the calibration scores alone. The second has the number of images from
the change to the alarm at 1 %: median and 90th percentile, "-" if that is beyond the horizon.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tyro

from gradnorm_jax.calibration import (
    init_drift,
    init_martingale,
    update_drift,
    update_martingale,
)

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """Simulates streams of scores.

    Attributes:
        draws: how many streams for each rate of false alarms.
        changes: how many streams for each delay.
        length: images in an in-distribution stream.
        horizon: images after a change.
    """

    draws: int = 1000
    changes: int = 200
    length: int = 5000
    horizon: int = 2000


def main(options: Options) -> None:
    """Prints both tables."""
    rng = np.random.default_rng(0)
    print(f"False alarms in {options.draws} streams of {options.length} images\n")
    print("| calibration | scores | at 10 % | at 1 % | calibration alone, at 10 % | at 1 % |")
    print("| ---: | :--- | ---: | ---: | ---: | ---: |")
    for size in (100, 1000, 10_000):
        for tied in (False, True):
            lowest = np.array(
                [false_alarms(options, size, tied, rng) for _ in range(options.draws)]
            )
            cells = [rate(lowest[:, way] <= alpha) for way in (0, 1) for alpha in (0.1, 0.01)]
            scores = "tied" if tied else "continuous"
            print(f"| {size} | {scores} | {' | '.join(cells)} |", flush=True)
    print("\nImages from a change to the alarm at 1 %\n")
    columns = [(size, before) for size in (200, 1000, 5000) for before in (0, 1000)]
    print("| change | " + " | ".join(f"n={n}, after {k}" for n, k in columns) + " |")
    print("| :--- |" + " ---: |" * len(columns))
    for name, change in CHANGES.items():
        cells = []
        for size, before in columns:
            found = [delay(options, size, before, change, rng) for _ in range(options.changes)]
            median, late = np.quantile(found, [0.5, 0.9], method="higher")
            cells.append(f"{show(median)}, {show(late)}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def false_alarms(
    options: Options, size: int, tied: bool, rng: np.random.Generator
) -> tuple[float, float]:
    """The lowest p-value of a stream, and that of a test against the calibration scores alone."""
    scores = rng.normal(size=size + options.length)
    if tied:
        scores = np.round(2 * scores) / 2
    calibration, stream = np.sort(scores[:size]), scores[size:]
    _, drift = update_drift(init_drift(calibration, int(rng.integers(2**32))), stream)
    below = np.searchsorted(calibration, stream, side="left")
    at_most = np.searchsorted(calibration, stream, side="right")
    uniform = rng.uniform(1e-12, 1 - 1e-12, size=len(stream))
    alone, _ = update_martingale(
        init_martingale(), (below + uniform * (at_most - below + 1)) / (size + 1)
    )
    return float(drift.p_value[-1]), alone.p_value


def delay(
    options: Options, size: int, before: int, change: Change, rng: np.random.Generator
) -> float:
    """How many images after a change the alarm is raised; the first of them is image 1."""
    calibration, quiet, after = (rng.normal(size=n) for n in (size, before, options.horizon))
    stream = np.concatenate([quiet, change(after, rng)])
    _, drift = update_drift(init_drift(calibration, int(rng.integers(2**32))), stream)
    alarm = drift.p_value[before:] <= 0.01
    return float(alarm.argmax() + 1) if alarm.any() else np.inf


def mixed(fraction: float) -> Change:
    """So many of the images are far out-of-distribution."""
    return lambda x, rng: np.where(rng.random(len(x)) < fraction, x - 4, x)


CHANGES: dict[str, Change] = {
    "lower by 4 sd (AUROC 0.998)": lambda x, rng: x - 4,
    "lower by 2 sd (0.92)": lambda x, rng: x - 2,
    "lower by 1 sd (0.76)": lambda x, rng: x - 1,
    "lower by 0.5 sd (0.64)": lambda x, rng: x - 0.5,
    "lower by 0.25 sd (0.57)": lambda x, rng: x - 0.25,
    "higher by 1 sd": lambda x, rng: x + 1,
    "half of them lower by 4 sd": mixed(0.5),
    "10 % of them lower by 4 sd": mixed(0.1),
    "5 % of them lower by 4 sd": mixed(0.05),
    "twice as wide": lambda x, rng: 2 * x,
}


def rate(alarms: np.ndarray) -> str:
    """A fraction with its standard error, in percent."""
    p = alarms.mean()
    return f"{100 * p:.1f} ± {100 * np.sqrt(p * (1 - p) / len(alarms)):.1f}"


def show(images: float) -> str:
    """A number of images."""
    return "-" if np.isinf(images) else f"{images:.0f}"


if __name__ == "__main__":
    main(tyro.cli(Options))
