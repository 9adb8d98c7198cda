"""What a detector file names rather than holds: its model and the preprocessing."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.data.preprocess import Prepare, Preprocess, get_preprocess
from gradnorm_jax.evaluation.run_config import describe_preprocess
from gradnorm_jax.models import get_architecture, init_model
from gradnorm_jax.models.named import load_named
from gradnorm_jax.references import is_reference
from gradnorm_jax.tree import get_leaf, leaves_by_name
from gradnorm_jax.types import Model


class Made(NamedTuple):
    """A model and the preprocessing that is its own."""

    model: Model
    preprocess: Prepare


def make_model(
    facts: Mapping[str, Any],
    held: Mapping[str, np.ndarray],
    allow: Callable[[str], None],
    weights: str | os.PathLike[str] | None,
) -> Made:
    """The model that a file names; see `load_detector`.

    Args:
        facts: of the file.
        held: the arrays of the model, if the file holds them.
        allow: raises ValueError for modules that are not to be imported.
        weights: where its weights are, if not where the file says.
    """
    name, dtype = facts["model"], facts["dtype"]
    if name is None:
        raise ValueError("it does not tell how its model is made: give the model")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"its dtype {dtype!r} is neither float32 nor bfloat16")
    if is_reference(name):
        allow(name.partition(":")[0])
    if held and weights is None:
        return Made(_fill(name, facts["classes"], dtype, held), None)
    where = facts["weights"] if weights is None else weights
    made = load_named(name, None if where is None else Path(where), dtype)
    return Made(jax.tree.map(jnp.asarray, made.model), made.preprocess)


def _fill(name: str, classes: Any, dtype: str, held: Mapping[str, np.ndarray]) -> Model:
    """A known network with the arrays that the file holds."""
    if not isinstance(classes, int) or classes < 1:
        raise ValueError("it does not tell how many classes its network has")
    make = functools.partial(init_model, name, classes, dtype=dtype)
    template = jax.eval_shape(make, jax.random.key(0))
    wanted = leaves_by_name(template)
    if held.keys() != wanted.keys() or any(
        (held[key].shape, held[key].dtype) != (leaf.shape, leaf.dtype)
        for key, leaf in wanted.items()
    ):
        raise ValueError(f"the weights in it are not those of {name} with {classes} classes")
    leaves = [jnp.asarray(held[key]) for key in wanted]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def count_classes(model: Model, name: str | None) -> int:
    """How many classes a known network has."""
    assert name is not None
    kernel = get_leaf(model.params, get_architecture(name).classifier_path)
    return int(kernel.shape[-1])


def spec_of(preprocess: Prepare) -> str | None:
    """The text that `get_preprocess` makes it of; None if there is none."""
    if not isinstance(preprocess, Preprocess):
        return None
    try:
        return preprocess.name if get_preprocess(preprocess.name) == preprocess else None
    except (ImportError, ValueError):
        return None


def find_preprocess(
    facts: Mapping[str, Any],
    own: Prepare,
    given: Prepare | str,
    allow: Callable[[str], None],
) -> Prepare:
    """The preprocessing that a file names, or tells from others by its facts.

    Args:
        facts: of the file.
        own: that of the model.
        given: by the user; it comes first.
        allow: raises ValueError for modules that are not to be imported.

    Raises:
        ValueError: it is not the one that the detector was calibrated with.
    """
    spec = facts["preprocess"]
    if isinstance(given, str):
        found: Prepare = get_preprocess(given)
    elif given is not None:
        found = given
    elif spec is not None:
        if is_reference(spec):
            allow(spec.partition(":")[0])
        found = get_preprocess(spec)
    else:
        found = own
    described = json.loads(json.dumps(describe_preprocess(found)))
    if described != facts["preprocess_facts"]:
        raise ValueError(
            f"the detector was calibrated with the preprocessing {facts['preprocess_facts']}, not "
            f"{described}: give that one (preprocess)"
        )
    return found
