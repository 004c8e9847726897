"""The wording of captions and which texts count as the same, for both the builder of the table and the training."""

import re
import unicodedata
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, Language] = ("en", "zh")

_APOSTROPHES = re.compile("['\u2018\u2019]")
_PREFIX = re.compile(r"^([^:：]+)[:：]\s*(.+)$")


def plain(text: str) -> str:
    """`text` as the tokenizer sees it: in lower case, without accents, with spaces for punctuation.

    `#` and `*` stay, because they are the names of two keys. Two texts with the same plain form are
    the same query.

    >>> plain("Woman\u2019s  Hat!")
    'womans hat'
    """
    decomposed = unicodedata.normalize("NFKD", text)
    unmarked = "".join(c for c in decomposed if unicodedata.category(c) != "Mn").lower()
    spaced = "".join(
        " " if unicodedata.category(c).startswith("P") and c not in "#*" else c for c in _APOSTROPHES.sub("", unmarked)
    )
    return " ".join(unicodedata.normalize("NFC", spaced).split())


def name_forms(name: str, language: Language) -> list[str]:
    """The ways to say one name of CLDR, beginning with the name itself.

    CLDR writes families of names as "prefix: rest" ("flag: Bolivia", "旗: 玻利维亚"); people
    say "Bolivia flag", "flag of Bolivia" or just "Bolivia".
    """
    match = _PREFIX.match(name)
    if match is None:
        return [name]
    prefix, rest = match.groups()
    if language == "zh":
        extra = [f"{rest}国旗"] if prefix == "旗" else []
        return [name, rest, f"{rest}{prefix}", *extra]
    extra = [f"flag of {rest}"] if prefix == "flag" else []
    return [name, rest, f"{rest} {prefix}", *extra]


def caption(name_en: str, name_zh: str) -> str:
    """The caption of one image in the demo's tars, in both languages."""
    return f"{name_en}. {name_zh}"
