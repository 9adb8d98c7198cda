"""Which temperature of the softmax?

    python experiments/paper/temperatures.py --model bit_s_r101x1 --weights BiT-S-R101x1 \
        --id imagenet/val --ood Textures=dtd/images --out runs/temperatures

All of them cost one forward pass.
"""

import tyro

from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions

TEMPERATURES = ("0.25", "0.5", "1", "2", "4", "8", "16", "32", "64")
ROWS = {f"T = {t}": f"gradnorm(temperature={t})" for t in TEMPERATURES}

if __name__ == "__main__":
    run_study("Temperatures of GradNorm", tyro.cli(EvaluateOptions, description=__doc__), ROWS)
