"""Text from outside, such as the names of files: data, whatever characters it holds."""

import re


def to_utf8(text: str) -> str:
    r"""`text` that can be written: lone surrogates, for bytes that are not UTF-8, as `\xNN`."""
    return re.sub("[\ud800-\udfff]", lambda found: _escape(found[0]), text)


def printable(text: str) -> str:
    r"""`text` on one line: line ends, control and hidden characters as `\n`, `\x1b`, `\u202e`."""
    # A terminal acts upon some of them, and others hide what a name is.
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def escape_markdown(text: str) -> str:
    """`printable` text that Markdown shows as it is."""
    return re.sub(r"[\\`*\[\]<>|~&#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))


def _escape(character: str) -> str:
    # What stands for byte NN is U+DCNN.
    code = ord(character) - 0xDC00
    if 0x80 <= code <= 0xFF:
        return f"\\x{code:02x}"
    return character.encode("unicode_escape").decode()
