"""Does training decide whether GradNorm works? Networks alike but for how they were trained.

    python experiments/training_study.py digits --out runs/study/digits
    python experiments/training_study.py cifar --train cifar10_train.parquet --test cifar10/test \
        --ood textures=dtd/images --epochs 30 --out runs/study/resnet20

SGD and Adam, each with and without weight decay, with several seeds. It prints a table in which
every cell is the mean over the seeds and their standard deviation. Run again, it trains only what
is missing; several processes share the work with `--process 0/3` to `--process 2/3`.
"""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import optax
import tyro

import gradnorm_jax as gj
from experiments import runs, train_cifar, training
from experiments.training import Metrics
from gradnorm_jax.cli import demo, demo_data
from gradnorm_jax.evaluation.tables import Table, to_markdown

DETECTORS = ("msp", "energy", "gradnorm")
WEIGHT_DECAY = 1e-4
RATES: dict[Literal["sgd", "adam"], float] = {"sgd": 0.1, "adam": 1e-3}
"""Where each is commonly started; neither was tuned."""
# At 0.1, without a warm-up, the demo's network does not always learn its training images.
DIGITS_RATES = RATES | {"sgd": 0.03}


class Recipe(NamedTuple):
    """How a network is trained."""

    optimizer: Literal["sgd", "adam"]
    weight_decay: float

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.optimizer}, {'weight decay' if self.weight_decay else 'no decay'}"


RECIPES = tuple(Recipe(*pair) for pair in itertools.product(RATES, (WEIGHT_DECAY, 0.0)))


def digits(out: Path, steps: int = 300, seeds: int = 3, process: str = "0/1") -> None:
    """The network of the demo on scikit-learn's digits, with a cosine schedule.

    Args:
        out: folder for the metrics of each run.
        steps: of each run.
        seeds: how many.
        process: I/N, this process is number I, from 0, of N that share the runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        demo_data.write_images(images)

        def run(recipe: Recipe, seed: int) -> Metrics:
            rate = optax.cosine_decay_schedule(DIGITS_RATES[recipe.optimizer], steps)
            optimizer = training.make_optimizer(recipe.optimizer, rate, recipe.weight_decay)
            model = demo.train(images / "train", steps, seed, optimizer=optimizer)
            sets = {name: images / name for name in demo_data.OOD_SETS}
            result = gj.evaluate(
                model, images / "test", sets, detectors=DETECTORS, preprocess="bit32"
            )
            return training.ood_metrics(result)

        _run_all(run, out, seeds, process)


def cifar(
    train: str,
    test: str,
    ood: tuple[str, ...],
    out: Path,
    epochs: int = 30,
    seeds: int = 3,
    process: str = "0/1",
) -> None:
    """ResNet-20, with the paper's schedule of steps; data as in `train_cifar.py`.

    Args:
        train: training images.
        test: in-distribution test images.
        ood: out-of-distribution sets, each as NAME=DATA.
        out: folder for the runs.
        epochs: of each run.
        seeds: how many.
        process: I/N, this process is number I, from 0, of N that share the runs.
    """

    def options(recipe: Recipe, seed: int) -> train_cifar.Options:
        return train_cifar.Options(
            train=train,
            test=test,
            out=out / _name(recipe, seed),
            ood=ood,
            detectors=DETECTORS,
            epochs=epochs,
            optimizer=recipe.optimizer,
            learning_rate=RATES[recipe.optimizer],
            weight_decay=recipe.weight_decay,
            evaluate_every=epochs,
            seed=seed,
        )

    data = train_cifar.read_data(options(RECIPES[0], 0))

    def run(recipe: Recipe, seed: int) -> Metrics:
        chosen = options(recipe, seed)
        train_cifar.train(chosen, data)
        return runs.read_history(chosen.out)[-1]

    _run_all(run, out, seeds, process)


def _run_all(train: Callable[[Recipe, int], Metrics], out: Path, seeds: int, process: str) -> None:
    """Carries out this process's share of what is missing; prints the table if all is there."""
    out.mkdir(parents=True, exist_ok=True)
    index, count = map(int, process.split("/"))
    # All recipes with one seed come before the next seed.
    pairs = [(recipe, seed) for seed in range(seeds) for recipe in RECIPES]
    files = {pair: out / f"{_name(*pair)}.json" for pair in pairs}
    for pair in pairs[index::count]:
        if not files[pair].exists():
            files[pair].write_text(json.dumps(train(*pair)))
    if all(file.exists() for file in files.values()):
        print(to_markdown(table({pair: json.loads(f.read_text()) for pair, f in files.items()})))


def table(metrics: dict[tuple[Recipe, int], Metrics]) -> Table:
    """A row for each recipe and detector, AUROC / FPR95 in percent of each OOD set."""
    names = list(
        dict.fromkeys(key.split("/")[1] for key in next(iter(metrics.values())) if "/" in key)
    )

    def cell(recipe: Recipe, key: str) -> str:
        values = [100 * found[key] for (each, _), found in metrics.items() if each == recipe]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread}"

    rows = [
        [
            recipe.title,
            detector,
            cell(recipe, "test_accuracy"),
            *(
                " / ".join(
                    cell(recipe, f"{detector}/{name}/{metric}") for metric in ("auroc", "fpr95")
                )
                for name in names
            ),
        ]
        for recipe in RECIPES
        for detector in DETECTORS
    ]
    return Table(["Training", "Score", "Top-1", *names], rows, names=2)


def _name(recipe: Recipe, seed: int) -> str:
    return f"{recipe.optimizer}-{recipe.weight_decay:g}-{seed}"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"digits": digits, "cifar": cifar})
