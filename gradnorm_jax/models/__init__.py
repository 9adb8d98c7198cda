"""The networks known by name: how to build them, load their weights, and feed them."""

import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.convolution import lower_convolutions
from gradnorm_jax.models import architecture as architectures
from gradnorm_jax.models import checkpoint
from gradnorm_jax.models.architecture import Architecture, WeightsLayout
from gradnorm_jax.models.table import MODELS
from gradnorm_jax.tree import Params
from gradnorm_jax.types import Model, Outputs, Variables
from gradnorm_jax.weights.files import read_checkpoint, write_checkpoint
from gradnorm_jax.weights.published import PUBLISHED, Published, download

__all__ = [
    "MODELS",
    "PUBLISHED",
    "Architecture",
    "Published",
    "WeightsLayout",
    "convert",
    "download",
    "get_architecture",
    "init_model",
    "load_model",
    "save_weights",
]


def load_model(
    name: str,
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    on_host: bool = False,
) -> Model:
    """A network with the weights of a file, in any format of `weights.files` and known layout.

    The number of classes is the file's.

    Args:
        name: a key of `MODELS`.
        path: the weights: a `.npz`, `.safetensors`, `.msgpack` or PyTorch file, a folder of Orbax,
            or what `download` returns.
        dtype: of the activations; parameters are float32 in any case.
        on_host: leave the parameters as NumPy arrays in place of putting them on the default
            device, which may be too small for them; see `gradnorm_jax.sharding.put_shared`.

    Returns:
        A `Model` of images `[B, H, W, 3]` that are scaled as its preprocessing does. Models of one
        name, number of classes and dtype share one function, so that none of them causes a retrace.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: reading such files needs a package of an extra.
        ValueError: the name is unknown; the file cannot be read; its keys and shapes are not
            exactly those of the network; or a number in it is not finite.
    """
    architecture = get_architecture(name)
    arrays = read_checkpoint(path, lambda headers: _check(headers, architecture))
    layout = architectures.find_layout(arrays, architecture)
    arrays = layout.clean(arrays)
    # What is not finite need not show in the scores: XLA for CPUs turns NaN into 0 where it
    # compiles a rectifier and a mean into one loop.
    checkpoint.check_finite(arrays)
    num_classes = architectures.count_classes(arrays, architecture, layout)
    template = architectures.template(architecture, num_classes)
    variables = checkpoint.to_variables(arrays, template, layout.entry)
    variables = variables if on_host else jax.device_put(variables)
    return _model(architecture, num_classes, variables, dtype)


def init_model(
    name: str, num_classes: int, key: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> Model:
    """A network with random weights, to be trained.

    Args:
        name: a key of `MODELS`.
        num_classes: C.
        key: PRNG key.
        dtype: of the activations; parameters are float32 in any case.

    Raises:
        ValueError: the name is unknown.
    """
    architecture = get_architecture(name)
    size = architecture.image_size
    is_traced = isinstance(key, jax.core.Tracer)
    init = _init_on_cpu if jax.default_backend() == "cpu" and not is_traced else _init
    variables = init(architecture.build(num_classes), key, (1, size, size, 3))
    return _model(architecture, num_classes, variables, dtype)


def save_weights(
    params: Params, name: str, path: str | os.PathLike[str], *, state: Any = None
) -> None:
    """Writes a network's arrays, in the first of its layouts, to a file that `load_model` reads.

    Args:
        params: of a model with the architecture `name`.
        name: a key of `MODELS`.
        path: ends in `.safetensors` or `.npz`.
        state: the model's, if the network has batch statistics.

    Raises:
        ValueError: the name is unknown, the path ends in something else, or the arrays are not
            those of the network, batch statistics included.
    """
    architecture = get_architecture(name)
    layout = architecture.layouts[0]
    variables = checkpoint.merge({"params": params, **(state or {})})
    arrays = checkpoint.from_params(variables, layout.entry)
    architectures.check(arrays, architecture, layout)
    write_checkpoint(path, jax.device_get(arrays))


def convert(source: str | os.PathLike[str], name: str, path: str | os.PathLike[str]) -> Model:
    """Writes weights from anything that `load_model` reads as `save_weights` does.

    The file needs no package of another framework to be read, and its parameters are float32.

    Args:
        source: the weights, as `load_model` takes them.
        name: a key of `MODELS`.
        path: the file to be written, which ends in `.safetensors` or `.npz`.

    Returns:
        The model, its arrays on the host.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: see `load_model` and `save_weights`.
    """
    model = load_model(name, source, on_host=True)
    save_weights(model.params, name, path, state=model.state)
    return model


def get_architecture(name: str) -> Architecture:
    """The row of `MODELS` called `name`; ValueError that lists them if there is none.

    The published names of BiT's weights do as well: `bit_s_r101x1` and `bit_m_r101x1` tell what
    they were trained on, and the network is `bit_r101x1`.
    """
    key = re.sub("^bit_[sm]_", "bit_", name)
    if key not in MODELS:
        plain = re.sub("^bit_[sm]_", "bit_", name.lower().replace("-", "_"))
        close = difflib.get_close_matches(plain, MODELS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"no architecture {name!r}; {hint}choose one of {', '.join(MODELS)}")
    return MODELS[key]


def _check(headers: Mapping[str, Any], architecture: Architecture) -> None:
    layout = architectures.find_layout(headers, architecture)
    try:
        architectures.check(layout.clean(dict(headers)), architecture, layout)
    except ValueError as error:
        for other in MODELS.values():
            if architectures.fits(headers, other):
                raise ValueError(
                    f"these are weights of {other.name} and not of {architecture.name}: did you "
                    f"mean {other.name}?"
                ) from error
        raise


def _model(
    architecture: Architecture,
    num_classes: int,
    variables: Mapping[str, Params],
    dtype: jax.typing.DTypeLike,
) -> Model:
    apply = _pure_apply(architecture.build(num_classes, dtype=jnp.dtype(dtype)))
    state = {name: tree for name, tree in variables.items() if name != "params"}
    arrays = Variables(variables["params"], state) if state else Variables(variables["params"])
    return Model(jax.tree_util.Partial(apply), arrays, architecture.head)


@functools.cache
def _pure_apply(module: nn.Module) -> Callable[[Variables, jax.Array], Outputs]:
    # Cached because jit takes another function object for another computation.
    def apply(variables: Variables, images: jax.Array) -> Outputs:
        collections = {"params": variables.params, **dict(variables.state)}
        return cast(Outputs, module.apply(collections, images))

    return lower_convolutions(apply)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(module: nn.Module, key: jax.Array, shape: tuple[int, ...]) -> dict[str, Params]:
    return dict(module.init(key, jnp.zeros(shape)))


# The same numbers. What runs once need not be fast: that takes ten seconds to compile, this two.
_init_on_cpu = jax.jit(
    _init, static_argnums=(0, 2), compiler_options={"xla_backend_optimization_level": 1}
)
