"""What a report is made of, whatever it is written in: chapters, of sections, of blocks."""

from collections.abc import Sequence
from typing import NamedTuple

from gradnorm_jax.evaluation.tables import Table
from gradnorm_jax.reporting.charts import Chart
from gradnorm_jax.reporting.pictures import Picture


class Listing(NamedTuple):
    """Sentences, each by itself."""

    items: Sequence[str]


class Code(NamedTuple):
    """Lines to be copied."""

    lines: Sequence[str]


class Charts(NamedTuple):
    """Charts of one thing."""

    title: str
    charts: Sequence[Chart]


class Gallery(NamedTuple):
    """Pictures, and what is to be said of all of them."""

    title: str
    pictures: Sequence[Picture]
    remark: str = ""


Block = str | Table | Listing | Code | Charts | Gallery
"""A paragraph, or one of these."""


class Section(NamedTuple):
    """Blocks under a title.

    Attributes:
        title: of the section.
        blocks: in their order.
        for_papers: whether its tables are of results, for papers.
    """

    title: str
    blocks: Sequence[Block]
    for_papers: bool = False


class Chapter(NamedTuple):
    """All there is to say of a run, or of several side by side."""

    title: str
    sections: Sequence[Section]
