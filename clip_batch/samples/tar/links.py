"""Links of a tar: which member each of them stands for.

A hard link names an earlier member of its tar by its path. The target of a soft link counts from the link's own folder,
and may come later; of several members of that path, the last one counts, as it would after unpacking.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from clip_batch.samples.tar.headers import Damage, Link, Member, NextTar, Run

LONGEST = 40
"""Links in a chain, as Linux follows them; a longer chain, or a circle, leads nowhere."""


class LinkTarget(NamedTuple):
    """The content that a link stands for: `size` bytes at `offset`.

    `first` and `last` are the first and the last header of the links and the member of the chain, so that a slice that
    has these has all of them.
    """

    offset: int
    size: int
    first: int
    last: int


def find_targets(runs: Iterable[Run], links: Sequence[Link]) -> dict[int, LinkTarget]:
    """The targets of a tar's links, by the header of each; links whose target is not in the tar are absent."""
    entries: dict[tuple[int, str], list[Member | Link]] = {}  # what links name, by its tar (of several joined) and path
    wanted = {link.header: _target_path(link) for link in links}
    paths = set(wanted.values())
    tars: dict[int, int] = {}
    tar = 0
    for run in runs:
        if isinstance(run, NextTar):
            tar += 1
        elif not isinstance(run, Damage):
            for item in [run] if isinstance(run, Link) else map(Member._make, run):
                if isinstance(item, Link):
                    tars[item.header] = tar
                if (path := posixpath.normpath(item.name)) in paths:
                    entries.setdefault((tar, path), []).append(item)

    def follow(link: Link) -> LinkTarget | None:
        item: Member | Link = link
        first = last = link.header
        for _ in range(LONGEST):
            if isinstance(item, Member):
                return LinkTarget(item.offset, item.size, first, last)
            named = entries.get((tars[link.header], wanted[item.header]), [])
            count = len(named) if item.soft else bisect_left(named, item.header, key=lambda entry: entry.header)
            if not count:
                break
            item = named[count - 1]
            first, last = min(first, item.header), max(last, item.header)
        return None

    return {link.header: target for link in links if (target := follow(link))}


def linked_names(runs: Callable[[], Iterable[Run]]) -> dict[int, list[str]]:
    """The names of the links to each content, by its offset."""
    links = [run for run in runs() if isinstance(run, Link)]
    names: dict[int, list[str]] = {}
    if links:
        targets = find_targets(runs(), links)
        for link in links:
            if target := targets.get(link.header):
                names.setdefault(target.offset, []).append(link.name)
    return names


def _target_path(link: Link) -> str:
    """The path of what a link names, in the form of `posixpath.normpath`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.target) if link.soft else link.target)
