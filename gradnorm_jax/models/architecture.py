"""What is known of a network: how it is built, its weights files, its images."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from gradnorm_jax.models.checkpoint import (
    CheckpointEntry,
    Layout,
    check_layout,
    merge,
)
from gradnorm_jax.tree import Params, Path, show_path
from gradnorm_jax.types import Head
from gradnorm_jax.weights.stored import Checkpoint


@dataclasses.dataclass(frozen=True)
class WeightsLayout:
    """One way in which weights files of a network are laid out.

    Attributes:
        name: of those who publish such files.
        entry: where they hold each parameter and batch statistic.
        clean: removes what varies between files of this layout.
    """

    name: str
    entry: Layout
    clean: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint


FLAX = WeightsLayout("flax", lambda path: CheckpointEntry(show_path(path)))
"""That of Flax's own checkpoints, which every network can be read from."""


class Size(NamedTuple):
    """How large a network is, which tracing it would tell too, and takes seconds.

    Attributes:
        features: D; None if the last layer is not linear.
        parameters: how many numbers are trained, for the classes of the published weights.
        statistics: how many numbers its batch statistics are.
    """

    features: int | None
    parameters: int
    statistics: int = 0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, its weights files and its images.

    Attributes:
        name: what users call it.
        build: `(num_classes, dtype) -> module`, a Linen module whose call maps images
            `[B, H, W, 3]` to `Outputs`. It has parameters, and batch statistics or none.
        head: where the last layer is in the module's parameters; None if it is not linear.
        size: how large it is.
        layouts: how weights files are laid out, beside `FLAX`; the first is that of files written.
        preprocess: the preprocessing that its images need, as `get_preprocess` takes it.
        image_size: side of those images in pixels.
        num_classes: of the published weights.
        label_offset: class k of the data set is logit k + label_offset.
        classifier: the kernel whose last axis is the classes, where there is no head.
        source: where weights are published.
        license: of those weights.
    """

    name: str
    build: Callable[..., nn.Module]
    head: Head | None
    size: Size
    layouts: tuple[WeightsLayout, ...]
    preprocess: str
    image_size: int
    num_classes: int
    label_offset: int = 0
    classifier: Path | None = None
    source: str = ""
    license: str = ""

    @property
    def classifier_path(self) -> Path:
        """The kernel whose last axis is the classes."""
        path = self.classifier if self.head is None else self.head.kernel
        assert path is not None, f"{self.name} must say which kernel has the classes"
        return path


@functools.cache
def template(architecture: Architecture, num_classes: int) -> dict[str, Params]:
    """Shapes and types of the variables, by collection; nothing is allocated."""
    module = architecture.build(num_classes)
    size = architecture.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables: dict[str, Params] = jax.eval_shape(module.init, jax.random.key(0), images)
    return variables


def find_layout(arrays: Mapping[str, Any], architecture: Architecture) -> WeightsLayout:
    """The layout with the most keys in common with a weights file.

    Args:
        arrays: of the file, or their shapes and types, by key.
        architecture: the network that it is taken for.
    """

    def common(layout: WeightsLayout) -> int:
        return len(layout_keys(architecture, layout) & layout.clean(dict(arrays)).keys())

    return max((*architecture.layouts, FLAX), key=common)


@functools.cache
def layout_keys(architecture: Architecture, layout: WeightsLayout) -> frozenset[str]:
    """The keys of a network's weights files, which do not depend on the number of classes."""
    variables = merge(template(architecture, architecture.num_classes))
    return frozenset(layout.entry(path).key for path in traverse_util.flatten_dict(variables))


def count_classes(
    arrays: Mapping[str, Any], architecture: Architecture, layout: WeightsLayout
) -> int:
    """The number of classes of the network in a weights file."""
    entry = layout.entry(architecture.classifier_path)
    shape = arrays[entry.key].shape if entry.key in arrays else ()
    axes = entry.axes or range(len(shape))
    # Where there is no such kernel, conversion fails whatever the number, and says so.
    return shape[axes[-1]] if shape and len(shape) == len(axes) else 1


def fits(headers: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether a weights file with arrays of these shapes and types is one of the network."""

    def is_laid_out(layout: WeightsLayout) -> bool:
        try:
            arrays = layout.clean(dict(headers))
            if not _is_of_size(arrays, architecture, layout):
                return False  # Tracing the network takes a second.
            check(arrays, architecture, layout)
        except ValueError:
            return False
        return True

    return any(map(is_laid_out, (*architecture.layouts, FLAX)))


def _is_of_size(
    arrays: Mapping[str, Any], architecture: Architecture, layout: WeightsLayout
) -> bool:
    """Whether there are as many numbers as the network has, for whatever number of classes."""
    kernel = arrays.get(layout.entry(architecture.classifier_path).key)
    if kernel is None:
        return False
    numbers = sum(math.prod(array.shape) for array in arrays.values())
    size, classes = architecture.size, count_classes(arrays, architecture, layout)
    surplus = numbers - size.parameters - size.statistics
    per_class = math.prod(kernel.shape) // max(classes, 1)
    # With a bias, or without one.
    return surplus in ((classes - architecture.num_classes) * (per_class + i) for i in (0, 1))


def check(arrays: Mapping[str, Any], architecture: Architecture, layout: WeightsLayout) -> None:
    """Raises ValueError unless arrays, cleaned, are exactly those of the network."""
    num_classes = count_classes(arrays, architecture, layout)
    check_layout(arrays, merge(template(architecture, num_classes)), layout.entry)
