"""Texts that are searched for, as programs and shells give them."""

from __future__ import annotations

import os
import reprlib

from clip_batch.errors import ConfigError


def query_text(value: object, what: str) -> str:
    """A text to search for. ConfigError: it is no text, is blank, or has lone surrogates; `what` names it.

    A model would embed what it cannot read as it embeds an empty text, and give hits all the same.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{what} is {reprlib.repr(value)}: it must be one text")
    if not value.strip():
        raise ConfigError(f"{what} is {'blank' if value else 'empty'}: give words to search for")
    if not is_unicode(value):
        raise ConfigError(
            f"{what} is {reprlib.repr(value)}: it has characters that are no Unicode text, decode it anew"
        )
    return value


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode a text: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shell_text(word: str, flag: str) -> str:
    """The text that a word of the command line means: UTF-8, also where the terminal's encoding is ASCII.

    ConfigError: its bytes are neither text in that encoding nor UTF-8; `flag` names it.
    """
    if is_unicode(word):
        return word
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        raise ConfigError(f"{flag} is not valid in this terminal's encoding: set LANG=C.UTF-8") from None
