"""What do features and softmax contribute? U = ||h||_1, V = ||p - u||_1 and their product.

    python experiments/paper/factors.py --model bit_s_r101x1 --weights BiT-S-R101x1 \
        --id imagenet/val --ood Textures=dtd/images --out runs/factors

The three cost one forward pass.
"""

import tyro

from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions

ROWS = {"U": "feature_norm", "V": "residual_norm", "U V": "gradnorm"}

if __name__ == "__main__":
    run_study("Factors of GradNorm", tyro.cli(EvaluateOptions, description=__doc__), ROWS)
