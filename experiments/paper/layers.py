"""Which layers' gradients?

    python experiments/paper/layers.py --model bit_s_r101x1 --weights BiT-S-R101x1 \
        --id imagenet/val --ood Textures=dtd/images --out runs/layers

The norms of all layers are traced once for all rows, and most of the work is done once: five rows
of ResNet-20 take 1.6 times as long as one.
"""

import dataclasses
from typing import Any

import jax
import tyro

import gradnorm_jax as gj
from experiments.paper.study import run_study
from gradnorm_jax.cli.evaluate import EvaluateOptions
from gradnorm_jax.tree import selected_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersOptions(EvaluateOptions):
    """Compare GradNorm of groups of layers.

    Attributes:
        layers: a pattern of parameters' paths for each row, such as block1; "*" for all.
    """

    layers: tuple[str, ...] = ("block1", "block2", "block3", "block4", "*", "head")


def layers(*, select: str) -> gj.Detector:
    """GradNorm of the parameters whose paths match a pattern."""
    return gj.Detector("layers", "network", _of_layers, options={"select": select})


def _of_layers(state: Any, model: gj.Model, batch: gj.Batch, *, select: str) -> jax.Array:
    norms = _norms(model, batch.images)
    return gj.combine_norms({path: norms[path] for path in selected_paths(norms, select)}, ord=1)


@jax.jit  # traced once for all rows
def _norms(model: gj.Model, images: jax.Array) -> dict[str, jax.Array]:
    loss_fn = jax.tree_util.Partial(_kl_of_images, model)
    return gj.per_example_grad_norms(loss_fn, model.params, images, ord=1)


def _kl_of_images(model: gj.Model, params: Any, images: jax.Array) -> jax.Array:
    return gj.kl_to_uniform(model.apply(params, images).logits)


if __name__ == "__main__":
    options = tyro.cli(LayersOptions, description=__doc__)
    rows = {name: f"experiments.paper.layers:layers(select={name})" for name in options.layers}
    run_study("GradNorm by layer", options, rows)
