"""Finding the last layer of a classifier in its program.

From the logits one walks back through what only moves or casts entries, into and out of calls, past
the addition of a bias, to the matrix product or 1x1 convolution of something that depends on the
images with a parameter. That parameter is the kernel, the other operand the features.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.extend import core

from gradnorm_jax.adapters.frames import Frame, Ref, inputs_of, source
from gradnorm_jax.adapters.refusals import NoHeadError, refusal, source_line
from gradnorm_jax.adapters.steps import keeps_entries, reduce_steps, step_of, swaps_axes
from gradnorm_jax.jaxprs import shape_of
from gradnorm_jax.tree import Path, show_path
from gradnorm_jax.types import Head, Step


class Trace(NamedTuple):
    """A classifier's program.

    Attributes:
        frame: of the whole.
        params: paths of the parameters, by the values that they enter as.
        data: the values that the images enter as.
    """

    frame: Frame
    params: Mapping[Ref, Path]
    data: frozenset[Ref]


class Layer(NamedTuple):
    """The last layer where it is applied.

    Attributes:
        head: where its parameters are.
        output: what it yields, before the bias.
        position: of the features among its operands.
        features_order: the order of the features' axes that puts what is summed over last.
    """

    head: Head
    output: Ref
    position: int
    features_order: tuple[int, ...]

    @property
    def features(self) -> Ref:
        """The value that the features are, but for casts and the order of axes."""
        return skip_moves(self.output.operand(self.position))


class _Product(NamedTuple):
    """A product of data and a parameter, in terms of their axes."""

    position: int
    features_order: tuple[int, ...]
    rows: int
    kernel: Ref
    kernel_order: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    rows_first: bool


def find_layer(trace: Trace, logits: Ref, rows: int, classes: int) -> Layer:
    """The layer whose output, with its bias, the logits `[rows, classes]` are.

    Raises:
        NoHeadError: there is none; says what was met on the way, where, and what to do.
    """
    ref, bias, swapped = source(logits), None, False
    while True:
        equation = ref.equation
        if equation is None:
            raise NoHeadError("the logits are an input or a constant of the function, no result")
        position = keeps_entries(ref)
        if position is not None:
            change = swaps_axes(equation)
            if change is None:
                raise refusal(ref, trace.data, "a transposition that mixes images and classes")
            swapped ^= change
            ref = ref.operand(position)
        elif equation.primitive.name in ("add", "add_any"):
            added = _split_bias(trace, ref, classes, swapped=swapped)
            if added is None:
                return _sum_of_layers(trace, ref, rows, classes, bias)
            if bias is not None:
                raise refusal(ref, trace.data, "a second bias")
            bias, ref = added
        else:
            return _layer(trace, ref, rows, classes, bias, swapped=swapped)


def skip_moves(ref: Ref) -> Ref:
    """The value before all that only moves or casts its entries."""
    ref = source(ref)
    while (position := keeps_entries(ref)) is not None:
        ref = ref.operand(position)
    return ref


def _split_bias(
    trace: Trace, total: Ref, classes: int, *, swapped: bool
) -> tuple[Path, Ref] | None:
    """The path of the bias that is added, and what it is added to; None if there is no bias."""
    for bias, rest in ((0, 1), (1, 0)):
        path = _bias(trace, total, total.operand(bias), classes, swapped=swapped)
        if path is not None:
            return path, total.operand(rest)
    return None


def _bias(trace: Trace, total: Ref, ref: Ref, classes: int, *, swapped: bool) -> Path | None:
    """The path of a parameter with one entry for each class that is spread over all rows."""
    varying = {axis for axis, length in enumerate(ref.shape) if length > 1}
    if ref.equation is not None and ref.equation.primitive.name == "broadcast_in_dim":
        inner = ref.operand(0)
        axes = ref.equation.params["broadcast_dimensions"]
        varying = {axes[i] for i, length in enumerate(inner.shape) if length > 1}
        ref = inner
    leaf = _parameter(trace, ref)
    if leaf is None or math.prod(ref.shape) != classes:
        return None
    path, steps = leaf
    axes_of_logits = [axis for axis, length in enumerate(total.shape) if length > 1]
    if swapped:
        axes_of_logits.reverse()
    over_classes = set(axes_of_logits[len(axes_of_logits) - len(varying) :])
    in_order = all(name == "reshape" for name, _ in steps)
    return path if in_order and varying == over_classes else None


def _parameter(trace: Trace, ref: Ref) -> tuple[Path, tuple[Step, ...]] | None:
    """The parameter that a value holds the entries of, and how they were moved."""
    steps: list[Step] = []
    ref = source(ref)
    while ref not in trace.params:
        position = keeps_entries(ref)
        if position is None:
            return None
        steps[:0] = step_of(ref)
        ref = ref.operand(position)
    return trace.params[ref], tuple(steps)


def _sum_of_layers(trace: Trace, total: Ref, rows: int, classes: int, bias: Path | None) -> Layer:
    """The layer of a kernel plus a product of two others, applied to the same features."""
    layers = []
    for term in (0, 1):
        try:
            layers.append(find_layer(trace, total.operand(term), rows, classes))
        except NoHeadError:
            raise refusal(total, trace.data) from None
    for layer, other in (layers, layers[::-1]):
        low_rank = _low_rank(trace, layer, other, rows)
        if low_rank is not None and None in (bias, layer.head.bias):
            head = dataclasses.replace(layer.head, low_rank=low_rank, bias=layer.head.bias or bias)
            return layer._replace(head=head)
    raise refusal(total, trace.data, "a sum of two layers' outputs")


def _low_rank(trace: Trace, layer: Layer, other: Layer, rows: int) -> tuple[Path, Path] | None:
    """The paths of A and B if the other layer multiplies the features of the first by A B."""
    rank = math.prod(other.features.shape) // rows
    try:
        inner = find_layer(trace, other.features, rows, rank)
    except NoHeadError:
        return None
    a, b = inner.head.kernel, other.head.kernel
    plain = (inner.head, other.head) == (Head(a), Head(b))
    return (a, b) if plain and inner.features == layer.features else None


def _layer(
    trace: Trace, ref: Ref, rows: int, classes: int, bias: Path | None, *, swapped: bool
) -> Layer:
    product = _product(trace, ref)
    if product is None:
        raise refusal(ref, trace.data)
    kernel = _parameter(trace, product.kernel)
    if kernel is None:
        raise _computed_kernel(trace, ref, product.kernel)
    in_order = product.rows_first != swapped or 1 in (rows, classes)
    if product.rows != rows or product.kernel_shape[-1] != classes or not in_order:
        raise refusal(ref, trace.data, "a layer that is applied to more than one row an image")
    path, steps = kernel
    moved = (*steps, ("transpose", product.kernel_order), ("reshape", product.kernel_shape))
    leaf_shape = next(leaf.shape for leaf, name in trace.params.items() if name == path)
    head = Head(path, bias, reduce_steps(leaf_shape, moved))
    return Layer(head, ref, product.position, product.features_order)


def _product(trace: Trace, ref: Ref) -> _Product | None:
    """The matrix product or 1x1 convolution that yields a value; None if nothing of the kind."""
    equation = ref.equation
    assert equation is not None
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return None
    on_data = [bool(inputs_of(each) & trace.data) for each in ref.operands()]
    if sum(on_data) != 1:
        met = "a product of two factors that both depend on the images"
        raise refusal(ref, trace.data, met if all(on_data) else "a product of parameters alone")
    position = on_data.index(True)
    features, kernel = ref.operand(position), ref.operand(1 - position)
    if equation.primitive.name == "dot_general":
        contracted, batched = equation.params["dimension_numbers"]
        if batched[0]:
            raise refusal(ref, trace.data, "a batched matrix product")
        rows_first = position == 0
    else:
        if not _is_pointwise(equation, position):
            raise refusal(ref, trace.data, "a convolution over positions")
        spec = equation.params["dimension_numbers"]
        contracted = ((spec.lhs_spec[1],), (spec.rhs_spec[1],))
        rows_first = spec.out_spec[0] < spec.out_spec[1]
    free = [_others(features, contracted[position]), _others(kernel, contracted[1 - position])]
    rows, classes = (
        math.prod(each.shape[axis] for axis in axes)
        for each, axes in zip((features, kernel), free, strict=True)
    )
    return _Product(
        position=position,
        features_order=(*free[0], *contracted[position]),
        rows=rows,
        kernel=kernel,
        kernel_order=(*contracted[1 - position], *free[1]),
        kernel_shape=(math.prod(kernel.shape) // classes, classes),
        rows_first=rows_first,
    )


def _is_pointwise(equation: core.JaxprEqn, position: int) -> bool:
    """Whether a convolution takes one position of each image to one position."""
    spec, groups = equation.params["dimension_numbers"], equation.params
    images, kernel = (shape_of(atom).shape for atom in equation.invars)
    return (
        position == 0
        and groups["feature_group_count"] == groups["batch_group_count"] == 1
        and all(images[axis] == 1 for axis in spec.lhs_spec[2:])
        and all(kernel[axis] == 1 for axis in spec.rhs_spec[2:])
        and not any(padding for pair in groups["padding"] for padding in pair)
    )


def _others(ref: Ref, axes: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(ref.shape)) if axis not in axes)


def _computed_kernel(trace: Trace, layer: Ref, kernel: Ref) -> NoHeadError:
    """The error for a kernel that is not a parameter itself."""
    made = skip_moves(kernel)
    known = [trace.params[each] for each in inputs_of(made) if each in trace.params]
    if not known:
        return refusal(layer, trace.data, "a product with a kernel that is not among the params")
    assert made.equation is not None
    by = f"{made.equation.primitive.name}{source_line(made)}"
    names = ", ".join(sorted(map(show_path, known)))
    met = f"a product with a kernel that is computed, by {by}, from the parameters {names}"
    return refusal(layer, trace.data, met)
