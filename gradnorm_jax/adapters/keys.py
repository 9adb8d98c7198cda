"""Hashable keys by which modules, configurations and functions are compared, not identified.

A network is rebuilt more often than it changes: in a loop, in another cell of a notebook. Two that
are built alike have equal keys, so that what was compiled for one serves the other, whether or not
their attributes can be hashed.
"""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ATOMS = (str, bytes, bool, int, complex, type(None), type(Ellipsis), type, types.ModuleType)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """A value that rides in a pytree without being a leaf of it, and compares by its key.

    Attributes:
        key: see `freeze`.
        value: what the key stands for.
    """

    key: Hashable
    value: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and (
            self.key is other.key or (self._hash == other._hash and self.key == other.key)
        )


def static(value: Any) -> Static:
    """`value` as a node of a pytree that compares by what `value` is now."""
    return Static(freeze(value), value)


def freeze(value: Any) -> Hashable:
    """A key that is equal for values that are built alike.

    Containers, dataclasses, functions, partials and plain objects count by what they hold, and
    arrays by shape, type and content. What cannot be looked into counts by its identity, and so
    does a plain object that holds such a thing; the key keeps a reference, so that nothing else can
    take the identity over.
    """
    return _freeze(value, {}, within_object=False)


class _OpaqueError(Exception):
    """A plain object holds something that cannot be looked into."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Identity:
    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _freeze(value: Any, seen: dict[int, tuple[int, Any]], *, within_object: bool) -> Hashable:
    """The key of `value`; `seen` numbers what was met before and keeps it alive, by identity."""
    if isinstance(value, _Identity):
        return value
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, float):
        return float, repr(value)  # a NaN is not equal to itself, and 0.0 is equal to -0.0
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _freeze_array(value)
    if id(value) in seen:
        return "seen", seen[id(value)][0]
    seen[id(value)] = len(seen), value

    def each(values: Iterable[Any], *, within_object: bool = within_object) -> Hashable:
        return tuple(_freeze(item, seen, within_object=within_object) for item in values)

    parts = _parts(value)
    if parts is not None:
        return type(value), each(parts)
    if _compares(value):
        return type(value), value
    if attributes := _attributes(value):
        try:
            return type(value), each(attributes, within_object=True)
        except _OpaqueError:
            if within_object:
                raise
            return _Identity(value)
    if within_object and not callable(value):
        raise _OpaqueError
    return _Identity(value)


def _parts(value: Any) -> Iterable[Any] | None:
    """What a container, a function or a dataclass is made of; None for anything else."""
    match value:
        case Mapping():
            return (*value.keys(), *value.values())
        case list() | tuple():
            return value
        case set() | frozenset():
            return sorted(value, key=repr)
        case slice():
            return value.start, value.stop, value.step
        case functools.partial():
            return value.func, value.args, value.keywords
        case types.MethodType():
            return value.__func__, value.__self__
        case types.FunctionType():
            return _parts_of_function(value)
    return _attributes(value) if dataclasses.is_dataclass(value) else None


def _parts_of_function(function: types.FunctionType) -> tuple[Any, ...]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # the variable has no value yet
            cells.append(None)
    # By code and what it refers to, a lambda that is written once is one however often it is made.
    globals_ = _Identity(function.__globals__)
    return function.__code__, globals_, function.__defaults__, function.__kwdefaults__, *cells


def _attributes(value: Any) -> tuple[Any, ...]:
    """Names and values of an object's attributes; of a dataclass, fields and public ones."""
    named = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        named = {name: item for name, item in named.items() if not name.startswith("_")}
        named |= {name: getattr(value, name) for name in fields}
    return tuple(part for item in named.items() for part in item)


def _compares(value: Any) -> bool:
    """Whether a value has an equality of its own, and a hash."""
    if getattr(type(value), "__eq__", None) is object.__eq__:
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return (value == value) is True


def _freeze_array(array: Any) -> Hashable:
    if isinstance(array, jax.core.Tracer):
        return _Identity(array)
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            return _Identity(array)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return str(array.dtype), _freeze_array(jax.random.key_data(array))
    values = np.asarray(array)
    if values.dtype.hasobject:
        return _Identity(array)
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    return type(array), values.shape, str(values.dtype), getattr(array, "weak_type", False), digest
