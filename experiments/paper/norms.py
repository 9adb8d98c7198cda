"""Which norm of the gradient?

    python experiments/paper/norms.py --model bit_s_r101x1 --weights BiT-S-R101x1 \
        --id imagenet/val --ood Textures=dtd/images --out runs/norms

All of them cost one forward pass.
"""

import tyro

from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions

ROWS = {f"L{order}": f"gradnorm(ord={order})" for order in ("0.5", "1", "2", "3", "4", "6", "inf")}

if __name__ == "__main__":
    run_study(
        "Norms of the last layer's gradient", tyro.cli(EvaluateOptions, description=__doc__), ROWS
    )
