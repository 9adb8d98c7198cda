"""Where encoded images come from: anything that gives the i-th one, its id and its label."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class Record(NamedTuple):
    """One image of a source.

    Attributes:
        id: identifies it within the source, the same in every run.
        label: its class, 0, 1, ...; -1 if unknown.
        data: the contents of the image file.
    """

    id: str
    label: int
    data: bytes


@runtime_checkable
class Source(Protocol):
    """A finite sequence of records with random access, picklable for worker processes."""

    @property
    def name(self) -> str:
        """A short name for messages and results."""
        ...

    @property
    def ignored(self) -> Sequence[str]:
        """The files that were passed over because their names are not those of images."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def fingerprint(self) -> str:
        """A hash that tells it from other sources, and from other versions of itself."""
        ...


def hash_facts(facts: object) -> str:
    """The SHA-256, in hexadecimal digits, of facts (JSON)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_records(facts: object, records: Iterable[Record]) -> str:
    """The SHA-256, in hexadecimal digits, of facts (JSON) and of whole records."""
    contents = [(each.id, each.label, hashlib.sha256(each.data).hexdigest()) for each in records]
    return hash_facts([facts, contents])
