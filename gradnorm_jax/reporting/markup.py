"""HTML and SVG as trees of elements, whose text is only text, whatever characters it holds."""

from xml.etree import ElementTree

from gradnorm_jax.text import printable

Element = ElementTree.Element


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element with children, of which texts and None, which is nothing, may be any.

    Attributes are named as in Python: `class_` is class, `stroke_width` is stroke-width. Texts are
    made `printable`, and escaped when the page is written.
    """
    names = {name: name.removesuffix("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[k]: printable(str(v)) for k, v in attributes.items()})
    for child in children:
        if isinstance(child, str):
            _add_text(made, printable(child))
        elif child is not None:
            made.append(child)
    return made


def _add_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def style(css: str) -> Element:
    """A style sheet, as it is: never of text from outside."""
    made = Element("style")
    made.text = css
    return made


def to_html(root: Element) -> str:
    """A page."""
    return f"<!DOCTYPE html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"
