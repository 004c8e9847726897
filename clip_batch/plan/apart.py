"""Whether an output lies in its own input, or the input in it: the files of a first run would be input of the next."""

from __future__ import annotations

import os
from collections.abc import Iterable

from clip_batch.errors import ConfigError
from clip_batch.storage.paths import absolute, is_local


def contains(folder: str, place: str) -> bool:
    """Whether a path or URL is a folder itself, or lies below it; links of local folders are followed.

    >>> contains("s3://bucket/cats", "s3://bucket/cats/out"), contains("s3://bucket/cats", "s3://bucket/cats-out")
    (True, False)
    """
    return f"{_resolved(place)}/".startswith(f"{_resolved(folder)}/")


def check_apart(output: str, folders: Iterable[str]) -> None:
    """ConfigError: `output` lies in one of the input's folders, is one, or has one in it."""
    for folder in folders:
        if contains(folder, output):
            where = "is" if contains(output, folder) else "lies in"
            why = f"--output {output} {where} the input folder {folder}, so that what is written would be input too"
        elif contains(output, folder):
            why = f"the input folder {folder} lies in --output {output}, among the files that are written there"
        else:
            continue
        raise ConfigError(f"{why}: give an --output that is apart from it")


def beside(output: str, folders: Iterable[str]) -> str:
    """`output`, or where that would lie in one of the input's folders, the same name beside that folder."""
    name = output.rpartition("/")[2]
    for folder in sorted(filter(is_local, folders), key=_resolved, reverse=True):  # inner folders come first
        if contains(folder, output):
            output = os.path.join(os.path.dirname(_resolved(folder)) or "/", name)
    return output


def _resolved(place: str) -> str:
    return (os.path.realpath(absolute(place)) if is_local(place) else place).rstrip("/")
