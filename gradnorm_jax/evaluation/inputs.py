"""From options to what is evaluated: network and images, or what an earlier run kept of them."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import NamedTuple

from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.data.sources import Source, open_source
from gradnorm_jax.detectors import Detector, parse_detectors
from gradnorm_jax.evaluation.cache import cached_feed, head_model, read_ignored
from gradnorm_jax.evaluation.evaluate import FIT, ID
from gradnorm_jax.evaluation.folder import Folder, open_folder
from gradnorm_jax.evaluation.manifest import (
    Manifest,
    describe_source,
    differences,
    environment,
    hash_file,
    read_config,
)
from gradnorm_jax.evaluation.options import EvaluateOptions
from gradnorm_jax.evaluation.scoring import Feed, image_feed
from gradnorm_jax.evaluation.shards import read_rows
from gradnorm_jax.models import get_architecture, load_model
from gradnorm_jax.types import Model


class Inputs(NamedTuple):
    """What is evaluated.

    Attributes:
        manifest: what decides the results.
        model: the classifier, or its last layer where there are only its outputs.
        feeds: the data sets by name, in-distribution first.
        fit: labelled in-distribution training images.
        detectors: those asked for.
        not_run: why one of them cannot be run, by its name.
        label_offset: class k is logit k + label_offset.
    """

    manifest: Manifest
    model: Model
    feeds: Mapping[str, Feed]
    fit: Feed | None
    detectors: tuple[Detector, ...]
    not_run: Mapping[str, str]
    label_offset: int


def open_inputs(options: EvaluateOptions) -> Inputs:
    """Opens all that the options name, and finds what is wrong with them.

    Raises:
        ValueError: an option is wrong or missing, or does not fit the cache.
        OSError: a file cannot be read.
    """
    if options.batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {options.batch_size}")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"workers must be at least 1, got {options.workers}")
    if not 0 <= options.max_bad <= 1:
        raise ValueError(f"max-bad is a fraction from 0 to 1, got {options.max_bad}")
    detectors = parse_detectors(
        options.detectors, {"gradnorm": {"temperature": options.temperature}}
    )
    if options.from_cache is None:
        return _network_and_images(options, detectors)
    return _kept_outputs(options, detectors, open_folder(options.from_cache))


def _network_and_images(options: EvaluateOptions, detectors: tuple[Detector, ...]) -> Inputs:
    if options.model is None or options.weights is None or options.id is None:
        raise ValueError("--model, --weights and --id must be given, or --from-cache")
    architecture = get_architecture(options.model)
    preprocess = get_preprocess(options.preprocess or architecture.preprocess)
    sources = _open_sources(options)
    if len(sources) - (FIT in sources) < 2:
        raise ValueError("no OOD set is given; give at least one as NAME=PATH")
    feeds = {
        name: image_feed(
            name,
            source,
            preprocess,
            workers=options.workers,
            worker_processes=options.worker_processes,
        )
        for name, source in sources.items()
    }
    fit = feeds.pop(FIT, None)
    model = load_model(options.model, options.weights, on_host=True)
    options = dataclasses.replace(options, preprocess=preprocess.name)
    return Inputs(
        _describe(options, sources) | {"options": dataclasses.asdict(options)} | environment(),
        model,
        feeds,
        fit if options.cache or any(d.fit for d in detectors) else None,
        detectors,
        {},
        architecture.label_offset,
    )


def _kept_outputs(
    options: EvaluateOptions, detectors: tuple[Detector, ...], folder: Folder
) -> Inputs:
    if options.cache:
        raise ValueError("--cache keeps what --from-cache has: give only one of them")
    kept = read_config(folder)
    if kept is None:
        raise FileNotFoundError(f"{folder.address} holds no run; evaluate into it with --cache")
    if unlike := differences(kept, _describe(options, _open_sources(options))):
        raise ValueError(
            f"the cache in {folder.address} is of something else: {unlike}; leave out the options "
            "that are to be the cache's, or make another cache"
        )
    if unlike := differences(kept["versions"], environment()["versions"]):
        logging.getLogger(__name__).warning(
            "the cache in %s was made with other versions, and its last digits may be others than "
            "these would give: %s",
            folder.address,
            unlike,
        )
    model, ignored = head_model(folder), read_ignored(folder)
    sizes = {name: source["images"] for name, source in kept["sources"].items()}
    if not any(d.fit for d in detectors):
        sizes.pop(FIT, None)
    feeds = {
        name: cached_feed(folder, name, size, read_rows(folder, name, size), ignored[name])
        for name, size in sizes.items()
    }
    return Inputs(
        {"options": dataclasses.asdict(options), "cache": kept} | environment(),
        model,
        feeds,
        feeds.pop(FIT, None),
        detectors,
        {
            d.name: "it runs the network, of which the cache holds only the outputs"
            for d in detectors
            if d.needs == "network"
        },
        get_architecture(kept["options"]["model"]).label_offset,
    )


def _describe(options: EvaluateOptions, sources: Mapping[str, Source]) -> Manifest:
    """What decides features and logits, as far as it is given."""
    named = {"model": options.model, "preprocess": options.preprocess}
    return {
        "options": {name: value for name, value in named.items() if value is not None},
        **({"weights_sha256": hash_file(options.weights)} if options.weights else {}),
        "sources": {name: describe_source(source) for name, source in sources.items()},
    }


def _open_sources(options: EvaluateOptions) -> dict[str, Source]:
    """The data sets that are given, in-distribution first; of those missing, all are named."""
    sources, missing = {}, []
    for name, spec in _name_sources(options).items():
        try:
            sources[name] = open_source(spec, options.data_dir)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("; ".join(missing))
    return sources


def _name_sources(options: EvaluateOptions) -> dict[str, str]:
    specs = {ID: options.id} if options.id else {}
    for spec in options.ood:
        name, path = _parse_ood(spec)
        if name.lower() in {taken.lower() for taken in (ID, FIT, *specs)}:
            raise ValueError(f"OOD set name {name!r} is taken; give each set a name of its own")
        specs[name] = path
    return specs | ({FIT: options.fit} if options.fit else {})


def _parse_ood(spec: str) -> tuple[str, str]:
    name, equals, path = spec.partition("=")
    if not equals and spec.startswith("tfds:"):
        # Such a set has a name already: tfds:NAME[/CONFIG][:SPLIT].
        return spec.removeprefix("tfds:").partition(":")[0].partition("/")[0], spec
    if not (name and equals and path):
        raise ValueError(f"cannot read OOD set {spec!r}; write NAME=PATH")
    if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise ValueError(
            f"OOD set name {name!r} cannot be the name of a file; use letters, digits, . _ and -"
        )
    return name, path
