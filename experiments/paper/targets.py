"""Gradients towards the uniform distribution, or towards the predicted label?

    python experiments/paper/targets.py --model bit_s_r101x1 --weights BiT-S-R101x1 \
        --id imagenet/val --ood Textures=dtd/images --out runs/targets

Towards the prediction the gradient is small where the network is sure: there the lower norm is more
in-distribution, so its sign is turned.
"""

from typing import Any

import jax
import tyro

import gradnorm_jax as gj
from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions

ROWS = {
    "uniform": "gradnorm",
    "predicted label": "experiments.paper.targets:towards_prediction",
}


def towards_prediction() -> gj.Detector:
    """The negative norm of the cross entropy's gradient, with the prediction for a label."""
    return gj.Detector("towards_prediction", "outputs", _negative_norm)


def _negative_norm(state: Any, model: gj.Model, batch: gj.Batch) -> jax.Array:
    features, logits = batch.outputs
    return -gj.gradnorm(features, logits, target=gj.one_hot_prediction(logits))


if __name__ == "__main__":
    run_study("Targets of the loss", tyro.cli(EvaluateOptions, description=__doc__), ROWS)
