"""Which members make a sample: webdataset's rule, for members in any order."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from clip_batch.samples.tar.fast_headers import BLOCK
from clip_batch.samples.tar.headers import Damage, Link, NextTar, Run
from clip_batch.samples.tar.links import LinkTarget, find_targets
from clip_batch.storage.names import names_text
from clip_batch.types import Plan, extension

WIDTH = 7
"""Numbers a sample in `TarSamples.table`."""

_UNUSED = (0, 0, 0)  # the place of extensions that belong to no part


class NameRule(NamedTuple):
    """How names make samples (see `group_members`): the extensions of images and captions, and where keys end."""

    images: tuple[str, ...] = Plan.image_extensions
    captions: tuple[str, ...] = Plan.caption_extensions
    last_dot: bool = False

    @classmethod
    def of(cls, plan: Plan) -> NameRule:
        """The rule of a plan."""
        return cls(plan.image_extensions, plan.caption_extensions, plan.key_ends == "last-dot")

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The extensions of each part of a sample, in lower case: image, caption, JSON."""
        parts = (self.images, self.captions, ("json",))
        return tuple(tuple(dict.fromkeys(map(str.lower, part))) for part in parts)


class Dotted(NamedTuple):
    """A member whose extension `ending` is that of an image but for what comes before its last dot: "512.jpg"."""

    name: str
    ending: str
    header: int


class TarSamples(NamedTuple):
    """The samples of a tar in the order of their first members, as columns.

    - `keys`: the key of each sample, as `clip_batch.storage.names.name_text` writes it.
    - `table`: 7 numbers a sample (see `rows`).
    - `torn`: {b: a}; a cut before any of the samples a + 1 to b would separate members of one key.
    - `links`: every link.
    - `chains`: the first and the last header of each link that was followed and its target; a cut before any header but
      the first of these would separate them.
    - `dotted`: by a sample's number, its members that are images but for a dot.
    - `dotted_captions`: number of members that are captions but for a dot, by their extension.
    - `ignored`: number of members that belong to no part of a sample, except the `dotted` ones, by extension.
    - `others`: by a sample's number, the first of these, by extension.
    - `parts`: number of samples by the members that they have: the extensions of each part, best first.
    - `damage`: what could not be read.
    - `end`: the byte where the last member ends.
    """

    keys: list[str]
    table: array[int]
    torn: dict[int, int]
    links: list[Link]
    chains: list[tuple[int, int]]
    dotted: dict[int, list[Dotted]]
    dotted_captions: Counter[str]
    ignored: Counter[str]
    others: dict[int, str]
    parts: list[tuple[tuple[tuple[str, ...], ...], int]]
    damage: list[Damage]
    end: int

    def rows(self) -> Iterator[tuple[str, int, int, int, int, int, int, int]]:
        """(key, the first member's header, then offset and size of each part; 0, 0 where it is absent), in bytes.

        A part that is a link without a target has the offset -1, and the link's number in place of its size.
        """
        return zip(self.keys, *[iter(self.table)] * WIDTH, strict=True)

    @property
    def images(self) -> Sequence[int]:
        """The offset of each sample's image; 0 where there is none."""
        return self.table[1::WIDTH]

    def passed_over(self, needs_image: bool = True) -> Counter[str]:
        """Number of members that are part of no sample that has an image, and of no failure, by extension.

        The failure of a sample without an image stands for its parts and for one other member, or if it has members
        that are images but for a dot, for these: each of them is a failure. Without `needs_image` there are no such
        failures.
        """
        images = self.images if needs_image else [1] * len(self.keys)
        passed = Counter(self.ignored)
        for number, members in self.dotted.items():
            if images[number]:
                passed.update(extension(member.name) for member in members)
        passed.subtract(
            name for number, name in self.others.items() if not images[number] and number not in self.dotted
        )
        if self.links:
            for offsets in (self.table[3::WIDTH], self.table[5::WIDTH]):
                passed["link"] += sum(image != 0 > offset for image, offset in zip(images, offsets, strict=True))
        for parts, samples in self.parts:
            for name in (name for part in parts for name in part[1:]):
                passed[name] += samples
        return +passed


def read_samples(runs: Callable[[], Iterable[Run]], rule: NameRule = NameRule()) -> TarSamples:
    """The samples of the members and links that `runs` gives; it is called three times where there are links."""
    samples = group_members(runs(), rule)
    return group_members(runs(), rule, find_targets(runs(), samples.links)) if samples.links else samples


def group_members(
    runs: Iterable[Run], rule: NameRule = NameRule(), targets: Mapping[int, LinkTarget] | None = None
) -> TarSamples:
    """Group members into samples; takes about 300 bytes of memory a sample.

    webdataset's rule: the key is the path up to the first dot of the base name, and the extension is the rest,
    lower-cased. With `rule.last_dot` the key ends at the last dot. A member joins the latest sample of its key,
    wherever it is in the tar, unless that sample has a member of its extension; of tars that were joined, each has its
    own samples. Names without a dot, hidden files and what macOS adds (`._x`, `__MACOSX`) belong to no sample. Of
    several members for a part, the one whose extension is listed first is used. A link is a member with the content of
    its target, if `targets` has one for its header.
    """
    targets = targets or {}
    parts, last_dot = rule.parts, rule.last_dot
    places = _places(parts, last_dot)
    image_formats, text_formats = ({name.rpartition(".")[2] for name in part} for part in parts[:2])
    keys: list[str] = []
    table, blank = array("q"), array("q", [0] * WIDTH)
    torn: dict[int, int] = {}
    links: list[Link] = []
    chains: list[tuple[int, int]] = []
    dotted: dict[int, list[Dotted]] = {}
    dotted_captions: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    others: dict[int, str] = {}
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
        link = run if isinstance(run, Link) else None
        if isinstance(run, Link):
            target = targets.get(run.header)
            offset, size = (target.offset, target.size) if target else (-1, len(links))
            if target:
                chains.append((target.first, target.last))
            links.append(run)
            run = ((run.name, offset, size, run.header),)
        offset = size = -1
        for name, offset, size, header in run:
            place = places.get(name[known:]) if name.startswith(prefix) else None
            if place is None:
                base = name.rfind("/") + 1
                dot = name.rfind(".", base) if last_dot else name.find(".", base)
                ending = name[dot + 1 :].lower()
                if (
                    dot <= base
                    or not ending
                    or (base and "__MACOSX" in name[:base])
                    or (last_dot and name[base] == ".")
                ):
                    ignored[_kind(name, offset)] += 1
                    continue
                place = places.get(ending)
                if place is None:
                    if offset < 0 and ending.rpartition(".")[2] not in image_formats:
                        ignored["link"] += 1  # most lead to folders
                        continue
                    place = _UNUSED
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
                table[number * WIDTH] = header
                had = 0
            else:
                had = seen[number]
                seen[number] = had | bit
                if number != (latest := len(keys) - 1):
                    torn[latest] = min(number, torn.get(latest, number))
            if not bit:
                format = ending.rpartition(".")[2] if "." in ending else ""
                if format in image_formats:
                    dotted.setdefault(number, []).append(Dotted(name, ending, header))
                else:
                    if format in text_formats:
                        dotted_captions[ending] += 1
                    ignored[kind := _kind(name, offset)] += 1
                    others.setdefault(number, kind)
            elif not had & better:
                at = number * WIDTH + column
                table[at] = offset
                table[at + 1] = size
        if link:
            end = link.end
        elif offset >= 0:
            end = offset - (-size // BLOCK) * BLOCK
    counted = [(_present(bits, places, len(parts)), samples) for bits, samples in Counter(seen).items()]
    return TarSamples(
        names_text(keys), table, torn, links, chains, dotted, dotted_captions, ignored, others, counted, damage, end
    )


def _kind(name: str, offset: int) -> str:
    """What counts of members that are passed over call one: its extension; "link" where it leads nowhere."""
    if offset < 0:
        return "link"
    return "hidden" if "__MACOSX" in name else extension(name) or "no extension"


def _places(parts: Iterable[Sequence[str]], last_dot: bool) -> dict[str, tuple[int, int, int]]:
    """For each extension, lower-cased: its bit, the column of its part, and the bits of those listed before it."""
    places = {}
    bit = 1
    for part, extensions in enumerate(parts):
        better = 0
        for name in extensions:
            if (
                name and "/" not in name and name not in places and not (last_dot and "." in name)
            ):  # no member has another
                places[name] = (bit, 1 + 2 * part, better)
                better |= bit
                bit <<= 1
    return places


def _present(bits: int, places: Mapping[str, tuple[int, int, int]], parts: int) -> tuple[tuple[str, ...], ...]:
    """The extensions of each part whose bits are set, best first."""
    names: list[list[str]] = [[] for _ in range(parts)]
    for name, (bit, column, _) in places.items():
        if bits & bit:
            names[column // 2].append(name)
    return tuple(map(tuple, names))
