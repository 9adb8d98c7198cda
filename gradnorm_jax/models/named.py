"""Models by what users write: the name of a network, or of a function of their own."""

import inspect
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from gradnorm_jax.data.preprocess import Preprocess, get_preprocess
from gradnorm_jax.models import PUBLISHED, download, get_architecture, load_model
from gradnorm_jax.references import is_reference, load_reference
from gradnorm_jax.types import Model
from gradnorm_jax.weights.files import READERS
from gradnorm_jax.weights.published import get_published

Dtype = Literal["float32", "bfloat16"]


class Named(NamedTuple):
    """What a name stands for.

    Attributes:
        model: the classifier, its arrays on the host if it is a known network.
        preprocess: its own; None if there is none.
        label_offset: the logit of class 0.
    """

    model: Model
    preprocess: Preprocess | None
    label_offset: int = 0


def load_named(name: str, weights: Path | None = None, dtype: Dtype = "float32") -> Named:
    """The model that a name stands for.

    Args:
        name: a key of `MODELS`, or `module:function` of a function that returns a `Model`, or a
            `Model` and its `Preprocess`. It may take the path of weights, and a `dtype`.
        weights: a path, or the name of published weights.
        dtype: of the activations.

    Raises:
        ValueError: there is no such network or function, or weights are wanted or unwanted.
        OSError: the weights are not there.
    """
    if is_reference(name):
        return Named(*_build(name, weights, dtype))
    architecture = get_architecture(name)
    if weights is None:
        raise ValueError(f"the weights of {name} must be given (--weights)")
    path, own = find_weights(weights, name)
    logging.getLogger(__name__).info("%s with the weights in %s", name, path)
    return Named(
        load_model(name, path, dtype=jnp.dtype(dtype), on_host=True),
        get_preprocess(own or architecture.preprocess),
        architecture.label_offset,
    )


def find_weights(weights: str | Path, model: str) -> tuple[Path, str]:
    """Where weights are, and the preprocessing that is theirs alone, if any.

    Args:
        weights: a path, or the name of published weights, which are downloaded.
        model: the name of the network that they are wanted for.

    Raises:
        OSError: they cannot be downloaded.
        ValueError: no published weights go by the name, or they are of another network.
    """
    name, path = str(weights), Path(weights)
    if name not in PUBLISHED and (path.exists() or path.suffix.lower() in READERS):
        return path, ""
    published = get_published(name)
    if published.model != get_architecture(model).name:
        raise ValueError(
            f"{name} are weights of {published.model} and not of {model}: give --model "
            f"{published.model}"
        )
    return download(name), published.preprocess


def needed_preprocess(name: str, own: Preprocess | None) -> Preprocess:
    """The preprocessing of the model `name`; ValueError if it has none of its own."""
    if own is None:
        raise ValueError(
            f"{name} returns no Preprocess for its images: return (model, preprocess), or give "
            "--preprocess"
        )
    return own


def _build(name: str, weights: Path | None, dtype: Dtype) -> tuple[Model, Preprocess | None]:
    """What a user's function returns: the model and, if there is one, its preprocessing."""
    build = load_reference(name)
    if not callable(build):
        raise ValueError(f"{name} must be a function that returns a Model, got {build!r}")
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(build).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    arguments: dict[str, Any] = {}
    if "dtype" in parameters:
        arguments["dtype"] = jnp.dtype(dtype)
    elif dtype != "float32":
        raise ValueError(f"{name} takes no dtype: give it a parameter of that name, or no --dtype")
    paths = [key for key in parameters if key != "dtype"]
    if weights is not None:
        if not paths:
            raise ValueError(f"{name} takes no weights: give it a parameter, or no --weights")
        arguments[paths[0]] = weights
    required = [key for key in paths if parameters[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in arguments]:
        raise ValueError(f"{name} needs {', '.join(missing)}: give --weights")
    built = build(**arguments)
    model, preprocess = built if type(built) is tuple and len(built) == 2 else (built, None)
    if not isinstance(model, Model):
        raise ValueError(
            f"{name} must return a Model (of gradnorm_jax.from_linen, from_nnx, from_apply), or a "
            f"Model and a Preprocess, got a {type(built).__name__}"
        )
    return model, get_preprocess(preprocess) if isinstance(preprocess, str) else preprocess
