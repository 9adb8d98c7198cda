"""The options of `gradnorm-jax evaluate`."""

import dataclasses
from pathlib import Path
from typing import Literal

from gradnorm_jax.evaluation.hosts import Distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate detectors on an in-distribution set against out-of-distribution sets.

    A run that was killed or stopped goes on where it was when it is started again.

    Attributes:
        out: folder for the results: new, empty, or of the same run. A path or, as for gs://, a URL.
        model: bit_r50x1, bit_r101x1, bit_r152x2, bit_r50x3, bit_r101x3, bit_r152x4, bit_tiny or
            mobilenet_v2.
        weights: the model's weights, a .npz or .safetensors file.
        id: in-distribution test images: a folder, `csv:FILE` with columns file and label, or
            `tfds:NAME:SPLIT`.
        ood: one or more out-of-distribution sets, each as NAME=PATH, or `tfds:NAME`.
        fit: labelled in-distribution training images, for detectors that are fitted (mahalanobis).
        preprocess: bit480, bit32, crop224 or imagenet224; by default the model's own.
        detectors: names, each with options in parentheses if need be: `gradnorm(ord=2)`.
        temperature: of gradnorm.
        batch_size: of all devices, rounded up to a multiple of their number; no result depends on
            it.
        max_bad: the largest fraction of a set's images that may be undecodable. They are listed and
            left out; more of them stop the run.
        cache: keep features and logits as well, in this precision.
        from_cache: the folder of an earlier run with --cache, whose features and logits take the
            place of network and images. Of those, what is given is checked against it.
        distributed: make one program of several processes. `auto` asks the cluster (TPU pods,
            Slurm, ...); elsewhere give the coordinator's HOST:PORT, the number of processes, and
            which of them this one is, from 0.
    """

    out: str | Path
    model: str | None = None
    weights: Path | None = None
    id: str | None = None
    ood: tuple[str, ...] = ()
    fit: str | None = None
    preprocess: str | None = None
    detectors: tuple[str, ...] = ("msp", "odin", "mahalanobis", "energy", "gradnorm")
    temperature: float = 1.0
    batch_size: int = 64
    max_bad: float = 0.01
    cache: Literal["float32", "bfloat16"] | None = None
    from_cache: str | Path | None = None
    distributed: Distributed | None = None
