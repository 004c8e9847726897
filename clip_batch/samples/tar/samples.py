"""Which members make a sample: webdataset's rule, for members that may lie anywhere."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clip_batch.samples.tar.fast_headers import BLOCK, Fields
from clip_batch.samples.tar.headers import Damage

_WIDTH = 7
_OTHER = (0, 0, 0)


class Group(NamedTuple):
    """The samples of a tar in the order of their first members, as columns; the damage; the byte where it ends.

    `table` has 7 numbers of each sample (see `rows`). A cut before any of the samples a + 1 to b
    would tear a key apart, for each b: a of `torn`. `dotted` is by a sample's header: an extension of
    it that ends in a known one.
    """

    keys: list[str]
    table: array[int]
    torn: dict[int, int]
    dotted: dict[int, str]
    damage: list[Damage]
    end: int

    def rows(self) -> Iterator[tuple[str, int, int, int, int, int, int, int]]:
        """(key, first member's header, then offset and size of each part: 0, 0 where it has none), in bytes."""
        return zip(self.keys, *[iter(self.table)] * _WIDTH, strict=True)


def group(runs: Iterable[Iterable[Fields] | Damage], *parts: Sequence[str]) -> Group:
    """The samples among members: of all, as members of a sample may lie anywhere; about 300 bytes of memory a sample.

    The key is the path up to the first dot of the base name, and the extension the rest,
    lower-cased: webdataset's rule. A member joins the latest sample of its key, wherever it lies,
    unless that sample has its extension already. Names without a dot, hidden ones and what macOS
    adds (`._x`, `__MACOSX`) belong to none. `parts`, three at most, are lists of extensions; of
    several members for a part the first listed extension is taken.
    """
    places = _places(parts)
    keys: list[str] = []
    table, blank = array("q"), array("q", [0] * _WIDTH)
    torn: dict[int, int] = {}
    dotted: dict[int, str] = {}
    damage: list[Damage] = []
    numbers: dict[str, int] = {}  # of the latest sample of each key
    seen: list[int] = []  # bits of the extensions that each sample has
    prefix, known, number = "\0", 1, -1  # of the latest sample that got a member: most often it gets the next
    end = 0
    for run in runs:
        if isinstance(run, Damage):
            damage.append(run)
            end = run.offset + run.length
            continue
        offset = size = -1
        for name, offset, size, header in run:
            place = places.get(name[known:]) if name.startswith(prefix) else None
            if place is None:
                base = name.rfind("/") + 1
                dot = name.find(".", base)
                extension = name[dot + 1 :].lower()
                if dot <= base or not extension or "__MACOSX" in name[:base]:
                    continue
                place = places.get(extension, _OTHER)
                known = dot + 1
                prefix = name[:known]
                number = numbers.get(prefix, -1)
            bit, column, better = place
            if number < 0 or seen[number] & bit:
                if number >= 0:
                    torn[len(keys)] = number
                numbers[prefix] = number = len(keys)
                keys.append(prefix[:-1])
                seen.append(bit)
                table += blank
                table[number * _WIDTH] = header
                had = 0
            else:
                had = seen[number]
                seen[number] = had | bit
                if number != (latest := len(keys) - 1):
                    torn[latest] = min(number, torn.get(latest, number))
            if not bit:
                if extension.rpartition(".")[2] in places:
                    dotted[table[number * _WIDTH]] = extension
            elif not had & better:
                at = number * _WIDTH + column
                table[at] = offset
                table[at + 1] = size
        if offset >= 0:
            end = offset - (-size // BLOCK) * BLOCK
    return Group(keys, table, torn, dotted, damage, end)


def _places(parts: Iterable[Sequence[str]]) -> dict[str, tuple[int, int, int]]:
    """Of each extension, lower-cased: a bit of its own, the column of its part, the bits of those listed before it."""
    places = {}
    bit = 1
    for part, extensions in enumerate(parts):
        better = 0
        for extension in dict.fromkeys(map(str.lower, extensions)):
            if extension and "/" not in extension:  # no member has such
                places[extension] = (bit, 1 + 2 * part, better)
                better |= bit
                bit <<= 1
    return places
