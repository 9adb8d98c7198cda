"""The images that a detector is most wrong about, small, where they can be read again."""

import base64
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradnorm_jax.data.images import BadImage, decode_rgb
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.source import Source
from gradnorm_jax.evaluation.records import ID, ScoreTable
from gradnorm_jax.text import to_utf8

_SIDE = 192
"""Pixels of the longer side."""
_SHARP = 64
"""Images up to here are kept as they are, and shown with square pixels."""

OpenImages = Callable[[str], Source | str]
"""Opens the images of a data set; a sentence if that is not possible."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a data set.

    Attributes:
        id: its file.
        facts: its score, its class, and the like.
        image: the address of its pixels, `data:...`; None if there are none.
        sharp: whether they are few, and to be shown as squares.
        problem: why there are none.
    """

    id: str
    facts: Sequence[str]
    image: str | None = None
    sharp: bool = False
    problem: str = ""


def most_wrong(table: ScoreTable, name: str, detector: str, count: int) -> np.ndarray:
    """The rows of the inputs with the lowest scores of the ID set, or the highest of another."""
    scores = table.scores[detector]
    order = np.argsort(scores if name == ID else -scores, kind="stable")
    return order[:count]


def image_opener(
    sources: Mapping[str, str], data_dir: str | os.PathLike[str] | None = None
) -> OpenImages:
    """Opens images by the specs of their data sets, each when it is first asked for.

    Args:
        sources: by data set, what `data.open_source` takes.
        data_dir: where `tfds:` finds prepared data sets.
    """
    opened: dict[str, Source | str] = {}

    def open_images(name: str) -> Source | str:
        if name not in sources:
            return f"Where the images of {name} are is not recorded: give --source {name}=PATH."
        if name not in opened:
            try:
                opened[name] = open_source(sources[name], data_dir)
            except (ImportError, OSError, ValueError) as error:
                opened[name] = f"The images of {name} cannot be read again: {error}."
        return opened[name]

    return open_images


def picture(source: Source | str, table: ScoreTable, row: int, facts: Sequence[str]) -> Picture:
    """The picture of a row of a table, as far as its image can be read."""
    name = table.ids[row]
    if isinstance(source, str):
        return Picture(name, facts)
    try:
        record = source[int(table.positions[row])]
        if to_utf8(record.id) != name:
            return Picture(name, facts, problem="the data set has changed")
        return Picture(name, facts, *thumbnail(record.data))
    except (BadImage, IndexError, OSError) as error:
        return Picture(name, facts, problem=str(error))


def thumbnail(data: bytes) -> tuple[str, bool]:
    """The address `data:...` of a small version of an image file, and whether it has few pixels.

    Raises:
        BadImage: it cannot be decoded.
    """
    image = decode_rgb(data)
    sharp = max(image.size) <= _SHARP
    image.thumbnail((_SIDE, _SIDE))
    kind, options = ("png", {"optimize": True}) if sharp else ("jpeg", {"quality": 75})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", sharp
