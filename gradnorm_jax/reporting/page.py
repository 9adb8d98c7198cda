"""A report as one HTML page, which loads nothing, runs no script, and reads well anywhere."""

import importlib.resources
import itertools
from collections.abc import Iterable, Iterator, Sequence

from gradnorm_jax.evaluation.tables import Table
from gradnorm_jax.reporting.blocks import (
    Block,
    Chapter,
    Charts,
    Code,
    Gallery,
    Listing,
    Section,
)
from gradnorm_jax.reporting.charts import Chart
from gradnorm_jax.reporting.markup import Element, element, style, to_html
from gradnorm_jax.reporting.pictures import Picture

# Should anything ever slip through as markup, browsers load nothing and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(chapters: Sequence[Chapter], title: str) -> str:
    """The page."""
    css = (importlib.resources.files("gradnorm_jax.reporting") / "page.css").read_text("utf-8")
    numbered = list(enumerate(chapters))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        style(css),
    )
    body = element(
        "body",
        element("header", element("h1", title), _contents(numbered)),
        element("main", *(_chapter(i, each, len(chapters) > 1) for i, each in numbered)),
    )
    return to_html(element("html", head, body, lang="en"))


def _contents(chapters: Iterable[tuple[int, Chapter]]) -> Element:
    links = [
        element(
            "li",
            element("b", chapter.title),
            *(
                element("a", section.title, href=f"#{_anchor(i, j)}")
                for j, section in enumerate(chapter.sections)
            ),
        )
        for i, chapter in chapters
    ]
    return element("nav", element("ul", *links), aria_label="Contents")


def _anchor(chapter: int, section: int) -> str:
    # Not of titles, which may be anything.
    return f"section-{chapter + 1}-{section + 1}"


def _chapter(number: int, chapter: Chapter, several: bool) -> Element:
    title = element("h2", chapter.title) if several else None
    sections = [_section(_anchor(number, j), each) for j, each in enumerate(chapter.sections)]
    return element("article", title, *sections)


def _section(anchor: str, section: Section) -> Element:
    title = element("h3", section.title, id=anchor)
    return element("section", title, *itertools.chain.from_iterable(map(_block, section.blocks)))


def _block(block: Block) -> Iterator[Element]:
    match block:
        case str():
            yield element("p", block)
        case Listing(items):
            yield element("ul", *(element("li", item) for item in items))
        case Code(lines):
            yield element("pre", *(element("code", line) for line in lines))
        case Charts(title, charts):
            if title:
                yield element("h4", title)
            yield element("div", *map(_chart, charts), class_="charts")
        case Gallery(title, pictures, remark):
            yield element("h4", title)
            if remark:
                yield element("p", remark)
            yield element("div", *map(_picture, pictures), class_="pictures")
        case Table():
            if block.caption:
                yield element("p", block.caption, class_="caption")
            yield _table(block)


def _table(table: Table) -> Element:
    groups = None
    if table.groups:
        titles = (
            element("th", title, scope="colgroup", colspan=size) for title, size in table.groups
        )
        corner = element("th", colspan=table.names) if table.names else None
        groups = element("tr", corner, *titles)
    starts = set(itertools.accumulate((size for _, size in table.groups), initial=table.names))

    def class_of(j: int) -> str:
        return " ".join(["name"] * (j < table.names) + ["start"] * (j in starts))

    header = element(
        "tr",
        *(element("th", x, scope="col", class_=class_of(j)) for j, x in enumerate(table.header)),
    )
    rows = [
        element(
            "tr",
            *(
                element("th", x, scope="row", class_="name first")
                if j == 0
                else element(
                    "td", element("b", x) if (i, j) in table.marked else x, class_=class_of(j)
                )
                for j, x in enumerate(row)
            ),
        )
        for i, row in enumerate(table.rows)
    ]
    shown = element("table", element("thead", groups, header), element("tbody", *rows))
    # It scrolls by itself, by keyboard too; the page never does.
    return element(
        "div", shown, class_="table", tabindex=0, role="region", aria_label=table.caption or "Table"
    )


def _chart(chart: Chart) -> Element:
    legend = [
        element("li", element("i", class_=f"swatch {class_}"), text)
        for class_, text in chart.legend
    ]
    return element(
        "figure",
        element("figcaption", chart.title),
        chart.drawing,
        element("ul", *legend, class_="legend"),
    )


def _picture(picture: Picture) -> Element:
    if picture.image:
        kind = "sharp" if picture.sharp else "photo"
        shown = element("img", src=picture.image, alt=f"The image {picture.id}", class_=kind)
    else:
        shown = element("div", picture.problem or "no image", class_="missing")
    lines = [
        element("span", picture.id, class_="file"),
        *(element("span", x) for x in picture.facts),
    ]
    return element("figure", shown, element("figcaption", *lines))
