"""The options of `gradnorm-jax evaluate`."""

import dataclasses
from pathlib import Path
from typing import Literal

from gradnorm_jax.evaluation.hosts import Distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate detectors on an in-distribution set against out-of-distribution sets.

    A run that was killed or stopped goes on where it was when it is started again in the same way.
    With another batch size, other versions, or other numbers of devices or processes it is refused,
    because its files are to be those of an undisturbed run to the byte.

    Attributes:
        out: folder for the results: new, empty, or of the same run. A path or, as for gs://, a URL.
        model: bit_r50x1, bit_r101x1, bit_r152x2, bit_r50x3, bit_r101x3, bit_r152x4, bit_tiny or
            mobilenet_v2.
        weights: the model's weights, a .npz or .safetensors file.
        id: in-distribution test images: a folder, `csv:FILE` with columns file and label,
            `list:FILE@FOLDER` (OpenOOD's lists), or `tfds:NAME:SPLIT`.
        ood: one or more out-of-distribution sets, each as NAME=PATH, or `tfds:NAME`.
        fit: labelled in-distribution training images, for detectors that are fitted (mahalanobis).
        data_dir: where `tfds:` finds prepared data sets; by default where tfds puts them.
        preprocess: bit480, bit32, crop224 or imagenet224; by default the model's own.
        detectors: names, each with options in parentheses if need be: `gradnorm(ord=2)`.
        temperature: of gradnorm.
        batch_size: of all devices, rounded up to a multiple of their number; no result depends on
            it.
        devices_per_copy: how many devices hold a copy of the parameters between them, each a part;
            1 for a copy on every device. `auto` is 1, or more if a copy takes over half of a
            device's memory.
        workers: how many images each process decodes at once; by default as many as the CPUs that
            it may use.
        worker_processes: decode in processes in place of threads, for many cores and small images.
            They take seconds to start.
        max_bad: the largest fraction of a set's images that may be undecodable. They are listed and
            left out; more of them stop the run.
        cache: keep features and logits as well, in this precision; of the --fit images too, even if
            none of the detectors is fitted to them now.
        from_cache: the folder of an earlier run with --cache, whose features and logits take the
            place of network and images. Of those, what is given is checked against it. It may have
            been made on other devices and by other versions; the latter are named in a warning.
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
    data_dir: str | Path | None = None
    preprocess: str | None = None
    detectors: tuple[str, ...] = ("msp", "odin", "mahalanobis", "energy", "gradnorm")
    temperature: float = 1.0
    batch_size: int = 64
    devices_per_copy: int | Literal["auto"] = "auto"
    workers: int | None = None
    worker_processes: bool = False
    max_bad: float = 0.01
    cache: Literal["float32", "bfloat16"] | None = None
    from_cache: str | Path | None = None
    distributed: Distributed | None = None
