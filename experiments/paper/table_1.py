"""Table 1 of the paper: GradNorm and its baselines on four OOD sets.

    python experiments/paper/table_1.py --model bit_s_r101x1 --weights BiT-S-R101x1-flat-finetune \
        --id tfds:imagenet2012:validation --fit tfds:imagenet2012:train \
        --ood iNaturalist=tfds:inaturalist_ood SUN=tfds:sun_ood Places=tfds:places_ood \
        Textures=tfds:dtd --out runs/table-1

ODIN is T = 1000 without an input step, as in the paper. Mahalanobis is that of the last features.
"""

import tyro

from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions

ROWS = {
    "MSP": "msp",
    "ODIN": "odin",
    "Mahalanobis": "mahalanobis",
    "Energy": "energy",
    "GradNorm": "gradnorm",
}
SETS = ("iNaturalist", "SUN", "Places", "Textures")
FIGURES = {
    "MSP": ((63.69, 87.59), (79.98, 78.34), (81.44, 76.76), (82.73, 74.45)),
    "ODIN": ((62.69, 89.36), (71.67, 83.92), (76.27, 80.67), (81.31, 76.30)),
    "Mahalanobis": ((96.34, 46.33), (88.43, 65.20), (89.75, 64.46), (52.23, 72.10)),
    "Energy": ((64.91, 88.48), (65.33, 85.32), (73.02, 81.37), (80.87, 75.79)),
    "GradNorm": ((50.03, 90.33), (46.48, 89.03), (60.86, 84.82), (61.42, 81.07)),
}
PUBLISHED = {
    (row, name): figures
    for row, by_set in FIGURES.items()
    for name, figures in zip(SETS, by_set, strict=True)
}

if __name__ == "__main__":
    run_study(
        "GradNorm and its baselines",
        tyro.cli(EvaluateOptions, description=__doc__),
        ROWS,
        PUBLISHED,
    )
