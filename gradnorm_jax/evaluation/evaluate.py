"""The main job: scores of ID and OOD inputs by all detectors, and how well they separate them."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jax.sharding import Mesh

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.preprocess import Prepare, get_preprocess
from gradnorm_jax.detectors import Detector, parse_detectors
from gradnorm_jax.evaluation.checks import check_set_names
from gradnorm_jax.evaluation.evaluate_streams import evaluate_streams
from gradnorm_jax.evaluation.output_cache import cached_stream, read_head
from gradnorm_jax.evaluation.records import FIT, ID
from gradnorm_jax.evaluation.result import Result
from gradnorm_jax.evaluation.run_config import CONFIG, read_config
from gradnorm_jax.evaluation.storage import open_folder
from gradnorm_jax.progress import Track
from gradnorm_jax.types import Model

DEFAULT_DETECTORS = ("msp", "odin", "mahalanobis", "energy", "gradnorm")
"""The detectors of the paper's Table 1."""


def evaluate(
    model: Model,
    id_data: Any,
    ood_data: Mapping[str, Any],
    *,
    detectors: Iterable[str | Detector] = DEFAULT_DETECTORS,
    fit: Any = None,
    preprocess: Prepare | str = None,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    cache: Literal["float32", "bfloat16"] | None = None,
    batch_size: int = 64,
    label_offset: int = 0,
    max_undecodable: float = 0.01,
    mesh: Mesh | None = None,
    process: tuple[int, int] = (0, 1),
    wait_seconds: float = 3600.0,
    progress: bool | Track | None = None,
    should_stop: Callable[[], bool] = bool,
) -> Result:
    """Evaluates detectors on an in-distribution (ID) set against out-of-distribution (OOD) sets.

    All detectors that need only features and logits come from one forward pass, on all devices.

    >>> result = evaluate(model, (images, labels), {"svhn": svhn_images}, detectors=["gradnorm"])
    >>> print(result)
    >>> result["gradnorm", "svhn"].auroc.value

    A data set is any of: an array `[N, ...]` of inputs as the network takes them, or a pair of it
    and labels `[N]`; a loader of batches, or a function that returns one (Grain, `tf.data`,
    PyTorch, Hugging Face, a list), which yields arrays, pairs, or mappings with `image` and, if
    there are any, `label`, `id` and `mask`; a folder of images, or another string that names files
    on the command line (`csv:FILE`, `tfds:NAME:SPLIT`); a `Source` or a `DataStream`.

    With `out`, results are kept in a folder: scores (Parquet), metrics (JSON), a report (Markdown)
    and histograms (PNG); `gradnorm_jax.report` makes a page of them. Beside the scores it keeps the
    confidence and GradNorm's factors of each input. A run that was interrupted resumes when the
    same call is made again; its files come out the same to the byte, but for a journal of times. A
    folder that holds another run is refused, and the difference named. Several processes share a
    run, each with devices of its own, by nothing but the folder.

    Args:
        model: the classifier, from `from_linen`, `from_nnx`, `from_apply` or `models.load_model`.
        id_data: in-distribution test data.
        ood_data: out-of-distribution data by the name of their set.
        detectors: names, such as "gradnorm(ord=2)", or `Detector` objects.
        fit: in-distribution training data, with labels for detectors that need them. Without it
            detectors that are fitted are not run; without labels those of `all` that need them.
        preprocess: what image files need: a `Preprocess`, its name, or one composed as on the
            command line. It applies to uint8 arrays as well, image by image. Or a function of a
            batch `[B, ...]` that makes the network's input on the device.
        out: folder for the results: new, empty, or of the same run. A path, or a URL (`gs://`).
        name: identifies the model in the run folder, beside a hash of its arrays: say here what its
            arrays do not tell, such as the precision that it computes in.
        cache: keep features and logits in the folder too, in this precision; see `evaluate_cache`.
        batch_size: of all devices; no result depends on it, up to rounding.
        label_offset: class k is logit k + label_offset; it matters to the accuracy alone.
        max_undecodable: the largest fraction of a set's images that may be undecodable. They are
            listed and left out.
        mesh: the devices to use, by default all of this process. Parameters that are spread over
            devices already stay as they are, and their mesh is used.
        process: `(i, n)`: this process is number i of n that share the run through `out`.
        wait_seconds: how long to wait for the other processes, between fitting and scoring.
        progress: True or False for bars or none, a function `(items, description, total) -> items`
            for another kind; by default bars in a terminal or a notebook.
        should_stop: whether to stop after the present batch; then the call raises `Interrupted`.

    Returns:
        The result.

    Raises:
        ValueError: an argument is wrong, no detector can be run, a score is not finite, or a set
            has no usable input.
        OSError: a file cannot be read or written, or the folder holds something else.
        Interrupted: it was stopped, or another process has not finished fitting in time.
        Unfinished: this process has done its share, and others have not.
    """
    chosen = parse_detectors(detectors)
    prepare = get_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
    check_set_names(ood_data)
    streams = {
        key: as_stream(data, prepare, name=key) for key, data in {ID: id_data, **ood_data}.items()
    }
    if fit is not None and (cache or any(d.fit for d in chosen)):
        streams[FIT] = as_stream(fit, prepare, name=FIT)
    return evaluate_streams(
        model,
        streams,
        chosen,
        prepare,
        out=out,
        cache=cache,
        batch_size=batch_size,
        facts={"model": name, "label_offset": label_offset, "cache": cache},
        max_undecodable=max_undecodable,
        mesh=mesh,
        process=process,
        wait_seconds=wait_seconds,
        progress=progress,
        should_stop=should_stop,
    )


def evaluate_cache(
    run: str | os.PathLike[str],
    *,
    detectors: Iterable[str | Detector] = DEFAULT_DETECTORS,
    out: str | os.PathLike[str] | None = None,
    progress: bool | Track | None = None,
    should_stop: Callable[[], bool] = bool,
) -> Result:
    """Evaluates detectors on what an earlier run kept with `cache`, without network or images.

    Args:
        run: the folder of the earlier run.
        detectors: those that need no more than features and logits; the others are not run.
        out: folder for the results.
        progress: see `evaluate`.
        should_stop: see `evaluate`.

    Raises:
        ValueError: as in `evaluate`, or a file of the cache is damaged or missing.
        FileNotFoundError: the folder holds no cache.
    """
    folder = open_folder(run)
    config = read_config(folder)
    if config is None or not config.get("cache"):
        raise FileNotFoundError(f"{folder.address} holds no run with a cache; evaluate with one")
    chosen = parse_detectors(detectors)
    try:
        batch_size, label_offset = int(config["batch_size"]), int(config["label_offset"])
        part_size = batch_size * int(config["batches_per_part"])
        classes = {name: each.get("classes") for name, each in config["data"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.address}/{CONFIG} is damaged; run the command that wrote it in a new folder"
        ) from error
    return evaluate_streams(
        read_head(folder),
        {
            key: cached_stream(folder, key, part_size, number)
            for key, number in classes.items()
            if key != FIT or any(d.fit for d in chosen)
        },
        chosen,
        None,
        out=out,
        batch_size=batch_size,
        facts={"of": config, "label_offset": label_offset, "cache": None},
        not_run={
            d.name: "it runs the network, of which the cache holds only the outputs"
            for d in chosen
            if d.needs == "network"
        },
        max_undecodable=1.0,
        progress=progress,
        should_stop=should_stop,
    )
