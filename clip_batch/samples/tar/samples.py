"""Which members make a sample: webdataset's rule, for members in any order."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clip_batch.samples.tar.fast_headers import BLOCK
from clip_batch.samples.tar.headers import Damage, NextTar, Run

_WIDTH = 7
_UNUSED = (0, 0, 0)  # the place of extensions that belong to no part


class TarSamples(NamedTuple):
    """The samples of a tar in the order of their first members, as columns.

    - `keys`: the key of each sample.
    - `table`: 7 numbers a sample (see `rows`).
    - `torn`: {b: a}; a cut before any of the samples a + 1 to b would separate members of one key.
    - `dotted`: by a sample's header, an extension of the sample that ends in a known one ("512.jpg").
    - `damage`: what could not be read.
    - `end`: the byte where the last member ends.
    """

    keys: list[str]
    table: array[int]
    torn: dict[int, int]
    dotted: dict[int, str]
    damage: list[Damage]
    end: int

    def rows(self) -> Iterator[tuple[str, int, int, int, int, int, int, int]]:
        """(key, the first member's header, then offset and size of each part; 0, 0 where it is absent), in bytes."""
        return zip(self.keys, *[iter(self.table)] * _WIDTH, strict=True)


def group_members(runs: Iterable[Run], *parts: Sequence[str]) -> TarSamples:
    """Group members into samples; takes about 300 bytes of memory a sample.

    webdataset's rule: the key is the path up to the first dot of the base name, and the extension is the rest,
    lower-cased. A member joins the latest sample of its key, wherever it is in the tar, unless that sample has
    a member of its extension; of tars that were joined, each has its own samples. Names without a dot, hidden files and
    what macOS adds (`._x`, `__MACOSX`) belong to no sample. `parts` are at most three lists of extensions; of several
    members for a part, the one whose extension is listed first is used.
    """
    places = _places(parts)
    keys: list[str] = []
    table, blank = array("q"), array("q", [0] * _WIDTH)
    torn: dict[int, int] = {}
    dotted: dict[int, str] = {}
    damage: list[Damage] = []
    numbers: dict[str, int] = {}  # the number of the latest sample of each key
    seen: list[int] = []  # the extensions that each sample has, as bits
    prefix, known, number = "\0", 1, -1  # of the sample that got the last member: it usually gets the next one
    end = 0
    for run in runs:
        if isinstance(run, Damage):
            damage.append(run)
            end = run.offset + run.length
            continue
        if isinstance(run, NextTar):
            numbers.clear()
            prefix, number = "\0", -1
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
                place = places.get(extension, _UNUSED)
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
    return TarSamples(keys, table, torn, dotted, damage, end)


def _places(parts: Iterable[Sequence[str]]) -> dict[str, tuple[int, int, int]]:
    """For each extension, lower-cased: its bit, the column of its part, and the bits of those listed before it."""
    places = {}
    bit = 1
    for part, extensions in enumerate(parts):
        better = 0
        for extension in dict.fromkeys(map(str.lower, extensions)):
            if extension and "/" not in extension:  # no member has another
                places[extension] = (bit, 1 + 2 * part, better)
                better |= bit
                bit <<= 1
    return places
