"""A report in Markdown: the same as the page, but for charts and pixels."""

import itertools
from collections.abc import Iterator, Sequence

from gradnorm_jax.evaluation.tables import Table, to_markdown
from gradnorm_jax.reporting.blocks import Block, Chapter, Charts, Code, Gallery, Listing
from gradnorm_jax.text import escape_markdown, printable


def markdown(chapters: Sequence[Chapter], title: str) -> str:
    """The text."""
    parts = [f"# {escape_markdown(title)}"]
    for chapter in chapters:
        parts += [f"## {escape_markdown(chapter.title)}"] if len(chapters) > 1 else []
        for section in chapter.sections:
            parts.append(f"### {escape_markdown(section.title)}")
            parts += itertools.chain.from_iterable(map(_block, section.blocks))
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case str():
            yield escape_markdown(block)
        case Listing(items):
            yield "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Code(lines):
            yield "\n".join(f"    {printable(line)}" for line in lines)
        case Gallery(title, pictures, _):
            yield f"#### {escape_markdown(title)}"
            rows = [[each.id, ", ".join(each.facts)] for each in pictures]
            yield to_markdown(Table(["File", "Score and class"], rows, names=2))
        case Charts():
            pass
        case Table():
            if block.caption:
                yield escape_markdown(block.caption)
            if block.groups:
                size = block.groups[0][1]
                metrics = block.header[block.names : block.names + size]
                yield f"Each cell: {escape_markdown(' / '.join(metrics))}."
            yield to_markdown(block)
