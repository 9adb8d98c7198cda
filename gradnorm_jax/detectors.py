"""The Detector record and the table of all detectors.

A detector gives a score the one shape that the evaluation needs. Adding one takes a pure function
in `gradnorm_jax.scores` and a row in `DETECTORS`.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gradnorm_jax import scores
from gradnorm_jax.numerics import check_order, check_temperature
from gradnorm_jax.types import Model, Outputs


class Batch(NamedTuple):
    """What a detector sees of a batch.

    Attributes:
        images: `[B, ...]`, as the network takes them; None when only cached outputs are at hand.
        outputs: of the forward pass that all detectors share.
    """

    images: jax.Array | None
    outputs: Outputs


class Fit(NamedTuple):
    """How a detector learns its state from in-distribution training images, batch by batch.

    Attributes:
        update: `(outputs, labels) -> statistics` of one batch, both NumPy arrays `[B, ...]`. The
            statistics of two batches, or of two hosts, are merged by adding them leaf by leaf.
        finalize: `statistics -> state` for `Detector.score`.
    """

    update: Callable[[Outputs, np.ndarray], Any]
    finalize: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Detector:
    """A score in the shape that the evaluation gives to all scores.

    Attributes:
        name: what tables and files call it.
        needs: "outputs" if features and logits suffice; "network" if it runs the network again.
        score: pure function `(state, model, batch) -> [B]`, higher = more in-distribution.
        fit: how the state is learned; None if there is none (the state is then None).
    """

    name: str
    needs: Literal["outputs", "network"]
    score: Callable[[Any, Model, Batch], jax.Array]
    fit: Fit | None = None


def msp(*, temperature: float = 1.0) -> Detector:
    """Maximum softmax probability; see `scores.msp`."""
    check_temperature(temperature)
    return Detector(
        "msp",
        "outputs",
        lambda state, model, batch: scores.msp(batch.outputs.logits, temperature=temperature),
    )


def odin(*, temperature: float = 1000.0, epsilon: float = 0.0) -> Detector:
    """ODIN; see `scores.odin`. Without a step it needs only the outputs."""
    check_temperature(temperature)
    if not epsilon:
        return dataclasses.replace(msp(temperature=temperature), name="odin")

    def score(state: None, model: Model, batch: Batch) -> jax.Array:
        assert batch.images is not None
        return scores.odin(
            lambda images: model(images).logits,
            batch.images,
            temperature=temperature,
            epsilon=epsilon,
        )

    return Detector("odin", "network", score)


def energy(*, temperature: float = 1.0) -> Detector:
    """Negative free energy; see `scores.energy`."""
    check_temperature(temperature)
    return Detector(
        "energy",
        "outputs",
        lambda state, model, batch: scores.energy(batch.outputs.logits, temperature=temperature),
    )


def mahalanobis() -> Detector:
    """Distance to the nearest class mean of the training features; see `scores.mahalanobis`."""

    def update(outputs: Outputs, labels: np.ndarray) -> scores.ClassMoments:
        return scores.class_moments(outputs.features, labels, outputs.logits.shape[1])

    return Detector(
        "mahalanobis",
        "outputs",
        lambda state, model, batch: scores.mahalanobis(batch.outputs.features, state),
        Fit(update, scores.tied_gaussians),
    )


def gradnorm(
    *,
    temperature: float = 1.0,
    ord: float = 1.0,
    include_bias: bool = False,
    autodiff: bool = False,
    select: str | Sequence[str] | None = None,
) -> Detector:
    """GradNorm of the last layer in closed form, or of any parameters.

    Args:
        temperature: T of the softmax.
        ord: order of the norm.
        include_bias: of the last layer, its bias too; not together with `select`.
        autodiff: by the definition, `scores.gradnorm_by_autodiff`, instead of `scores.gradnorm`.
        select: parameters other than the last layer's kernel: a path pattern such as "block4" or
            several, or "all"; see `scores.gradnorm_of_parameters`.
    """
    check_temperature(temperature)
    check_order(ord)
    if select is not None and (include_bias or autodiff):
        raise ValueError("select chooses the parameters: leave out include_bias and autodiff")
    options: dict[str, Any] = {"temperature": temperature, "ord": ord}

    def closed_form(state: None, model: Model, batch: Batch) -> jax.Array:
        return scores.gradnorm(*batch.outputs, include_bias=include_bias, **options)

    def by_autodiff(state: None, model: Model, batch: Batch) -> jax.Array:
        assert batch.images is not None
        return scores.gradnorm_by_autodiff(
            model, batch.images, include_bias=include_bias, **options
        )

    def of_parameters(state: None, model: Model, batch: Batch) -> jax.Array:
        assert batch.images is not None
        selected = None if select == "all" else select
        return scores.gradnorm_of_parameters(model, batch.images, select=selected, **options)

    if select is not None:
        return Detector("gradnorm", "network", of_parameters)
    if autodiff:
        return Detector("gradnorm", "network", by_autodiff)
    return Detector("gradnorm", "outputs", closed_form)


DETECTORS: Mapping[str, Callable[..., Detector]] = {
    "msp": msp,
    "odin": odin,
    "mahalanobis": mahalanobis,
    "energy": energy,
    "gradnorm": gradnorm,
}


def parse_detectors(
    specs: Iterable[str], defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Detector, ...]:
    """Detectors from text such as `msp` or `gradnorm(temperature=2, ord=inf)`.

    Args:
        specs: names in `DETECTORS`, each with its options in parentheses if need be. The text,
            spaces removed, becomes the detector's name.
        defaults: options by name, which a spec may override.

    Raises:
        ValueError: a spec cannot be read, names no detector, repeats one, or has a wrong option.
    """
    detectors = tuple(_parse_detector(spec.strip(), defaults or {}) for spec in specs)
    names = [detector.name for detector in detectors]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"detector {name!r} is asked for more than once; name it once")
    if not detectors:
        raise ValueError(f"no detectors are asked for; known: {', '.join(DETECTORS)}")
    return detectors


def _parse_detector(spec: str, defaults: Mapping[str, Mapping[str, Any]]) -> Detector:
    name, options = _parse_call(spec)
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}; known: {', '.join(DETECTORS)}")
    build = DETECTORS[name]
    known = inspect.signature(build).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"detector {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}"
            )
    try:
        detector = build(**{**defaults.get(name, {}), **options})
    except TypeError as error:
        raise ValueError(f"detector {spec!r} has an option of the wrong type: {error}") from error
    return dataclasses.replace(detector, name="".join(spec.split()))


def _parse_call(spec: str) -> tuple[str, dict[str, Any]]:
    try:
        call = ast.parse(spec, mode="eval").body
    except SyntaxError:
        call = None
    match call:
        case ast.Name(id=name):
            return name, {}
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            return name, {str(k.arg): _parse_value(k.value, spec) for k in keywords}
    raise ValueError(
        f"cannot read detector {spec!r}; write NAME or NAME(option=value, ...), with "
        "quotes around a value that is neither a word, a path nor a number"
    )


def _parse_value(node: ast.expr, spec: str) -> Any:
    text = ast.get_source_segment(spec, node)
    if text == "inf":
        return float("inf")
    try:
        return ast.literal_eval(node)
    except ValueError:
        return text  # a bare word or path, which needs no quotes
