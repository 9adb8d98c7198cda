"""Which layers' gradients?

    python experiments/paper/layers.py --model bit_s_r101x1 --weights BiT-S-R101x1 \
        --id imagenet/val --ood Textures=dtd/images --out runs/layers

All rows together cost one pass of the per-example engine.
"""

import dataclasses

import tyro

from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersOptions(EvaluateOptions):
    """Compare GradNorm of groups of layers.

    Attributes:
        layers: a pattern of parameters' paths for each row, such as block1, or "all".
    """

    layers: tuple[str, ...] = ("block1", "block2", "block3", "block4", "all", "head")


if __name__ == "__main__":
    options = tyro.cli(LayersOptions, description=__doc__)
    rows = {name: f"gradnorm(select={name})" for name in options.layers}
    run_study("GradNorm by layer", options, rows)
