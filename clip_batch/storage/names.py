r"""Names of files that are not UTF-8, as Unix allows them: how they are kept in memory, and at rest.

In memory they are what Python makes of them (`os.fsdecode`): each byte that is not UTF-8 is a lone surrogate, U+DC80 to
U+DCFF, so no two names become one. Parquet, JSON and terminals hold UTF-8 alone, so there a byte is written as `\xNN`.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\x[0-9a-f]{2}")
_SURROGATES = re.compile("[\udc80-\udcff]")
_UNIT = re.compile(r"\\\\|\\x[89a-f][0-9a-f]")


def is_utf8(name: str) -> bool:
    """Whether a name has no byte that is not UTF-8."""
    return name.isascii() or not _SURROGATES.search(name)


def name_text(name: str) -> str:
    r"""A name as text that UTF-8 can encode; most names are returned as they are.

    Where a name has bytes that are not UTF-8, or the characters `\xNN` themselves, such a byte becomes `\xNN` and a
    backslash becomes two. No two names have the same text, and `text_name` gives the name back.

    >>> name_text("caf\udce9.jpg"), name_text("café.jpg")
    ('caf\\xe9.jpg', 'café.jpg')
    """
    if ("\\" not in name or not _ESCAPE.search(name)) and is_utf8(name):
        return name
    return _SURROGATES.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", name.replace("\\", "\\\\"))


def names_text(names: list[str]) -> list[str]:
    """`name_text` of each name; fast where all of them are ASCII without a backslash."""
    text = "".join(names)
    return names if text.isascii() and "\\" not in text else [name_text(name) for name in names]


def text_name(text: str) -> str:
    """The name that `name_text` wrote as this text."""
    if "\\" not in text or not _ESCAPE.search(text):
        return text
    return _UNIT.sub(lambda match: "\\" if match[0] == "\\\\" else chr(0xDC00 + int(match[0][2:], 16)), text)
