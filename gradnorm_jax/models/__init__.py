"""The networks known by name: how to build them, load their weights, and feed them."""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from gradnorm_jax.convolution import fast
from gradnorm_jax.models import bit, checkpoint, mobilenet_v2
from gradnorm_jax.models.bit import BiT
from gradnorm_jax.models.checkpoint import Checkpoint, Layout
from gradnorm_jax.models.mobilenet_v2 import MobileNetV2
from gradnorm_jax.tree import Params
from gradnorm_jax.types import Head, Model, Outputs, Variables

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BiT",
    "MobileNetV2",
    "get_architecture",
    "init_model",
    "load_model",
    "save_weights",
]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, its weights files and its images.

    Attributes:
        name: what users call it.
        build: `(num_classes, dtype) -> module`, a Linen module whose call maps images
            `[B, H, W, 3]` to `Outputs` and which has parameters only.
        head: where the last layer is in the module's parameters.
        layout: where weights files hold each parameter.
        preprocess: name of the preprocessing that its images need.
        image_size: side of those images in pixels.
        label_offset: class k of the data set is logit k + label_offset.
        clean: removes what varies between weights files of the same layout.
    """

    name: str
    build: Callable[..., nn.Module]
    head: Head
    layout: Layout
    preprocess: str
    image_size: int
    label_offset: int = 0
    clean: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint


def load_model(
    name: str,
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    on_host: bool = False,
) -> Model:
    """A network with the weights of a `.npz` or `.safetensors` file.

    The number of classes is the file's.

    Args:
        name: a key of `ARCHITECTURES`.
        path: the weights file.
        dtype: of the activations; parameters are float32 in any case.
        on_host: leave the parameters as NumPy arrays in place of putting them on the default
            device, which may be too small for them; see `gradnorm_jax.sharding.put_shared`.

    Returns:
        A `Model` of images `[B, H, W, 3]` that are scaled as its preprocessing does. Models of one
        name, number of classes and dtype share one function, so that none of them causes a retrace.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is unknown; the file cannot be read; its keys and shapes are not
            exactly those of the network; or a number in it is not finite.
    """
    architecture = get_architecture(name)

    def check(headers: Mapping[str, Any]) -> None:
        headers = architecture.clean(dict(headers))
        template = _template(architecture, _count_classes(headers, architecture))
        checkpoint.check_layout(headers, template, architecture.layout)

    arrays = architecture.clean(checkpoint.read_checkpoint(path, check))
    # What is not finite need not show in the scores: XLA for CPUs turns NaN into 0 where it
    # compiles a rectifier and a mean into one loop.
    checkpoint.check_finite(arrays)
    num_classes = _count_classes(arrays, architecture)
    params = checkpoint.to_params(arrays, _template(architecture, num_classes), architecture.layout)
    params = params if on_host else jax.device_put(params)
    return _model(architecture, num_classes, params, dtype)


def init_model(
    name: str, num_classes: int, key: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> Model:
    """A network with random weights, to be trained.

    Args:
        name: a key of `ARCHITECTURES`.
        num_classes: C.
        key: PRNG key.
        dtype: of the activations; parameters are float32 in any case.

    Raises:
        ValueError: the name is unknown.
    """
    architecture = get_architecture(name)
    params = _init(architecture.build(num_classes), key, _images(architecture).shape)
    return _model(architecture, num_classes, params, dtype)


def save_weights(params: Params, name: str, path: str | os.PathLike[str]) -> None:
    """Writes parameters to a `.npz` file that `load_model` reads.

    Args:
        params: of a model with the architecture `name`.
        name: a key of `ARCHITECTURES`.
        path: ends in `.npz`.

    Raises:
        ValueError: the name is unknown or the path does not end in `.npz`.
    """
    arrays = checkpoint.from_params(params, get_architecture(name).layout)
    checkpoint.write_checkpoint(path, jax.device_get(arrays))


def get_architecture(name: str) -> Architecture:
    """The row of `ARCHITECTURES` called `name`; ValueError that lists them if there is none.

    The published names of BiT's weights do as well: `bit_s_r101x1` and `bit_m_r101x1` tell what
    they were trained on, and the network is `bit_r101x1`.
    """
    key = re.sub("^bit_[sm]_", "bit_", name)
    if key not in ARCHITECTURES:
        plain = re.sub("^bit_[sm]_", "bit_", name.lower().replace("-", "_"))
        close = difflib.get_close_matches(plain, ARCHITECTURES, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"no architecture {name!r}; {hint}choose one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[key]


def _model(
    architecture: Architecture, num_classes: int, params: Params, dtype: jax.typing.DTypeLike
) -> Model:
    apply = _pure_apply(architecture.build(num_classes, dtype=jnp.dtype(dtype)))
    return Model(jax.tree_util.Partial(apply), Variables(params), architecture.head)


@functools.cache
def _pure_apply(module: nn.Module) -> Callable[[Params, jax.Array], Outputs]:
    # Cached because jit takes another function object for another computation.
    def apply(variables: Variables, images: jax.Array) -> Outputs:
        return cast(Outputs, module.apply({"params": variables.params}, images))

    return fast(apply)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(module: nn.Module, key: jax.Array, shape: tuple[int, ...]) -> Params:
    return module.init(key, jnp.zeros(shape))["params"]


def _count_classes(arrays: Mapping[str, Any], architecture: Architecture) -> int:
    entry = architecture.layout(architecture.head.kernel)
    shape = arrays[entry.key].shape if entry.key in arrays else ()
    axes = entry.axes or range(len(shape))
    # Where there is no such kernel, conversion fails whatever the number, and says so.
    return shape[axes[-1]] if shape and len(shape) == len(axes) else 1


def _images(architecture: Architecture) -> jax.ShapeDtypeStruct:
    size = architecture.image_size
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def _template(architecture: Architecture, num_classes: int) -> Params:
    """Shapes and types of the parameters; nothing is allocated."""
    module = architecture.build(num_classes)
    return jax.eval_shape(module.init, jax.random.key(0), _images(architecture))["params"]


def _bit(name: str, depths: tuple[int, ...], multiplier: int) -> Architecture:
    build = functools.partial(BiT, depths=depths, width=64 * multiplier)
    return Architecture(
        name,
        build,
        bit.HEAD,
        bit.layout,
        preprocess="bit480",
        image_size=480,
        clean=bit.remove_numbers,
    )


_R50, _R101, _R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
_ROWS = (
    _bit("bit_r50x1", _R50, 1),
    _bit("bit_r101x1", _R101, 1),
    _bit("bit_r152x2", _R152, 2),
    _bit("bit_r50x3", _R50, 3),
    _bit("bit_r101x3", _R101, 3),
    _bit("bit_r152x4", _R152, 4),
    dataclasses.replace(
        _bit("bit_tiny", (1, 1, 1, 1), 1),
        build=functools.partial(BiT, depths=(1, 1, 1, 1), width=16, groups=8),
        preprocess="bit32",
        image_size=32,
    ),
    Architecture(
        "mobilenet_v2",
        MobileNetV2,
        mobilenet_v2.HEAD,
        mobilenet_v2.layout,
        preprocess="crop224",
        image_size=224,
        label_offset=1,
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {row.name: row for row in _ROWS}
"""Every network known by name."""
