"""Finished runs, and pages read as browsers read them."""

import html.parser
from pathlib import Path

from PIL import Image

from gradnorm_jax.evaluation.evaluate import evaluate
from tests.evaluation import networks
from tests.evaluation.networks import PREPROCESS, images

DETECTORS = ["msp", "energy", "gradnorm"]


def write_images(folder, names, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(names, images(len(names), seed), strict=True):
        Image.fromarray(pixels).save(folder / name, "png")
    return folder


def run(out, id_data, ood_data, *, seed=0, **options):
    """A run of a network of random weights by `seed`."""
    options = {"detectors": DETECTORS, "preprocess": PREPROCESS, "name": "net", **options}
    return evaluate(
        networks.build(seed=seed), id_data, ood_data, out=out, progress=False, **options
    )


def numbered(count):
    return [f"{i:03}.png" for i in range(count)]


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, the text of each tag, the tables' cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.tables, self.marked = [], [], [], []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.text.setdefault(tag, []).append("")
        if tag not in ("meta", "img", "br", "link"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in set(self._open):
            self.text[tag][-1] += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
            if "b" in self._open:
                self.marked.append(data)


def read_page(path: Path) -> Page:
    return Page(path.read_text("utf-8"))
