"""What detectors cost on top of the forward pass: to score, to fit, and from kept outputs.

    python experiments/benchmarks/detectors.py --model bit_r50x1 --image-size 224 --batch-size 8

Groups of detectors are timed in turn, in one process, on random images and weights, against a plain
compiled forward pass over the same batches:

- score: each group behind one forward pass, fitted to random features, a bank of `bank_size` rows
  where there is one.
- fit: what all statistics take to learn from a part of 256 images whose outputs are known, those
  of one pass and those of two, each beside the forward passes; and what is done once, at the end.
- outputs: features and logits that are at hand already, as from a cache, per 1,000 rows; beside it,
  how many images the network takes in that time.

Printed are medians of times per image and of ratios measured side by side.
"""

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from throughput import seconds

from gradnorm_jax.detectors import DETECTORS, Detector, Fit, parse_detectors
from gradnorm_jax.evaluation.step import Placement, score_batch
from gradnorm_jax.models import init_model
from gradnorm_jax.sharding import batch_mesh
from gradnorm_jax.statistics import Examples, Statistic, learn, passes
from gradnorm_jax.types import LinearHead, Model, Outputs, linear_head, on_host


def has_bank(detector: Detector) -> bool:
    """Whether the detector keeps features of training images."""
    return detector.fit is not None and any("bank" in s.name for s in detector.fit.statistics)


def groups() -> dict[str, tuple[Detector, ...]]:
    """The detectors of the table that need no network, by what they ask for."""
    names = [name for name, row in DETECTORS.items() if not row.example]
    known = [d for d in parse_detectors(names) if d.needs != "network"]
    found = {
        "12 that learn nothing": [d for d in known if d.fit is None][:12],
        "gradient space": [
            d for d in known if DETECTORS[d.name].space == "gradient" and not has_bank(d)
        ],
        "all without banks": [d for d in known if not has_bank(d)],
        "knn": [d for d in known if d.name == "knn"],
        "all": known,
    }
    return {name: tuple(group) for name, group in found.items() if group}


def random_examples(model: Model, rows: int) -> Examples:
    """Features around some centres, positive as after a rectifier; labelled as predicted."""
    kernel = on_host(linear_head(model)).kernel.astype(np.float32)
    rng = np.random.default_rng(0)
    centres = rng.random(size=(min(kernel.shape[1], rows // 8), len(kernel)), dtype=np.float32)
    features = centres[np.arange(rows) % len(centres)] * rng.random((rows, 1), np.float32)
    features += 0.1 * rng.random(features.shape, dtype=np.float32)
    logits = features @ kernel
    labels = logits.argmax(axis=1).astype(np.int32)
    return Examples(features, logits, labels, np.arange(rows))


def fitted(model: Model, detectors: Sequence[Detector], bank_size: int) -> Mapping[str, Any]:
    """States learned from random examples, as many as the banks hold."""
    head, states = on_host(linear_head(model)), {}
    # Sums say as much of a few thousand images; some of them take long to form.
    for group, rows in ((True, bank_size), (False, 3000)):
        fits = {d.name: d.fit for d in detectors if d.fit and has_bank(d) == group}
        statistics = [s for fit in fits.values() for s in fit.statistics]
        known = learn(statistics, head, [random_examples(model, rows)])
        states |= zip(fits, finalize(fits.values(), head, known), strict=True)
    return states


def finalize(fits: Iterable[Fit], head: LinearHead, known: Mapping[Statistic, Any]) -> list[Any]:
    """The states of fitted detectors."""
    return [fit.finalize(head, *(known[s] for s in fit.statistics)) for fit in fits]


def learned(statistics: Iterable[Statistic], head: LinearHead, part: Examples) -> list[Any]:
    """The values of the statistics of one part."""
    return list(learn(statistics, head, [part]).values())


def score_batches(
    model: Model, states: Mapping[str, Any], detectors: tuple[Detector, ...], batches: Sequence[Any]
) -> list[Any]:
    """The scores of each batch by the step of the evaluation, on one device."""
    own = {d.name: states[d.name] for d in detectors if d.fit}
    placement = Placement(batch_mesh(jax.devices()[:1]))
    step = functools.partial(score_batch, detectors=detectors, preprocess=None, placement=placement)
    return [step(model, own, batch).scores for batch in batches]


def medians(
    ways: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each way, and of its ratio to the first, timed in turn."""
    for work in ways.values():
        seconds(work)  # compiles
    rounds = [{name: seconds(work) for name, work in ways.items()} for _ in range(repeats)]
    first = next(iter(ways))
    return (
        {name: statistics.median(r[name] for r in rounds) for name in ways},
        {name: statistics.median(r[name] / r[first] for r in rounds) for name in ways},
    )


def main(
    model: str = "bit_r50x1",
    image_size: int = 224,
    batch_size: int = 8,
    num_batches: int = 4,
    num_classes: int = 1000,
    bank_size: int = 50_000,
    rows: int = 2048,
    repeats: int = 5,
) -> None:
    """Times scoring, fitting and scoring from outputs, and prints the tables.

    Args:
        model: architecture.
        image_size: side of the images in pixels.
        batch_size: of the network.
        num_batches: how many make up a round.
        num_classes: size of the last layer.
        bank_size: how many training images those detectors are fitted to that keep them.
        rows: of features and logits in a round of the third table.
        repeats: rounds, each of which times all ways.
    """
    network = init_model(model, num_classes, jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = (num_batches * batch_size, image_size, image_size, 3)
    images = rng.random(size=shape, dtype=np.float32)
    batches = np.split(images, num_batches)
    found = groups()
    states = fitted(network, found["all"], bank_size)
    print(f"{len(found['all'])} detectors, bank of {bank_size}, {jax.devices()[0].device_kind}")

    def forward() -> Any:
        return [network(jnp.asarray(x)) for x in batches]

    score = functools.partial(score_batches, network, states)
    scoring = {name: functools.partial(score, group, batches) for name, group in found.items()}
    times, ratios = medians({"forward": forward, **scoring}, repeats)
    per_image = times["forward"] / len(images)
    print(f"\n{'score':24}{'ms / image':>12}{'time / forward':>16}")
    for name in times:
        print(f"{name:24}{1e3 * times[name] / len(images):12.2f}{ratios[name]:16.3f}")

    head, part = on_host(linear_head(network)), random_examples(network, 256)
    learning = [d for d in found["all without banks"] if d.fit]
    print(f"\n{'fit':24}{'ms / image':>12}{'time / forward':>16}{'s, once':>10}")
    for name, fits in {
        "those of one pass": [d.fit for d in learning if len(passes(d.fit.statistics)) == 1],
        "all without banks": [d.fit for d in learning],
    }.items():
        statistics = [s for fit in fits for s in fit.statistics]
        known = learn(statistics, head, [part])
        once = functools.partial(finalize, fits, head, known)
        update = functools.partial(learned, statistics, head, part)
        times, _ = medians({"update": update, "once": once}, repeats)
        reading = len(passes(statistics)) * per_image
        own = reading + times["update"] / len(part.labels)
        print(f"{name:24}{1e3 * own:12.2f}{own / reading:16.3f}{times['once']:10.2f}")

    kernel = np.asarray(linear_head(network).kernel)
    features = rng.random((rows, len(kernel)), np.float32)
    logits = features @ kernel
    held = [Outputs(features[i : i + 256], logits[i : i + 256]) for i in range(0, rows, 256)]
    from_outputs = {name: functools.partial(score, group, held) for name, group in found.items()}
    times, _ = medians(from_outputs, repeats)
    print(f"\n{'outputs':24}{'s / 1,000 rows':>16}{'as many images':>16}")
    for name, value in times.items():
        print(f"{name:24}{1e3 * value / rows:16.3f}{1e3 * value / rows / per_image:16.1f}")


if __name__ == "__main__":
    tyro.cli(main)
