"""Paths of the server in texts for its clients: only the last name of each is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_PATH = re.compile(r"(?:\b[a-zA-Z][a-zA-Z0-9+.\-]*://|(?<![\w.:/~])~?/)[^\s'\"<>|;,()]*/([^\s'\"<>|;,()/]*)")
"""An absolute path, or a URL, of two parts or more; the group is its last part."""


def without_paths(text: str, roots: Iterable[str] = ()) -> str:
    """Return a text in which each absolute path and each URL is cut to its last name.

    `roots` are folders that the text may name, whose names may have spaces.
    """
    for root in sorted((root.rstrip("/") for root in roots), key=len, reverse=True):
        if "/" in root:
            text = text.replace(root, os.path.basename(root))
    return _PATH.sub(r"\1", text)
