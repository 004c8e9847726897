"""What OUTs have in common with an index, and with each other: a row is added once, whatever OUT it comes through.

Parts that the index holds by their commit are passed over unread. Where other parts have source shards in common with
the index, or with an earlier OUT, the rows of these shards are compared by name (see `clip_batch.index.held`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from clip_batch.embeddings.outputs import Outputs
from clip_batch.embeddings.reader import Embeddings, Rows
from clip_batch.errors import ConfigError, some
from clip_batch.index import held
from clip_batch.index.held import Content, HeldSlice, Names, Places
from clip_batch.index.manifest import Manifest
from clip_batch.index.removed_rows import contains, replaced_ids
from clip_batch.storage.names import name_text
from clip_batch.storage.store import Store
from clip_batch.types import counted, format_numbers

Contents = dict[str, Content]
"""The content of source shards by their place."""


@dataclass(frozen=True)
class Overlap:
    """The source shards that several OUTs, or the index and an OUT, have.

    - `shared`: their places, numbered.
    - `base_sources`: the index's sources that have any of them.
    - `base_loses`, `loses`: for each place, whether the rows of the index, and of each OUT, are of an older content.
    - `mixed`: the places of which the index itself has had several contents.
    - `parts`: for each OUT, the partitions that have any of them.
    - `known`: for each OUT, the number of rows of parts that the index, or an earlier OUT, has by their commits.
    """

    shared: dict[str, int] = field(default_factory=dict)
    base_sources: frozenset[int] = frozenset()
    base_loses: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    loses: tuple[npt.NDArray[np.bool_], ...] = ()
    mixed: frozenset[str] = frozenset()
    parts: tuple[frozenset[int], ...] = ()
    known: tuple[int, ...] = ()


class LeftOut(NamedTuple):
    """The rows (n,) of all OUTs that are left out, ascending, and the ids (m,) of the index that they replace.

    `standing` counts, for each OUT, the rows left out that the index, or an earlier OUT, has.
    """

    rows: Rows
    replaced: Rows
    standing: tuple[int, ...]


def look(
    sources: Sequence[Embeddings], index: Store, base: Manifest | None, replace: bool, like: Manifest | None = None
) -> tuple[Outputs, Overlap]:
    """The OUTs without the parts that are known by their commits, and what of the rest is to be compared.

    Where a source shard has several contents, the last one is merged; with `like` that of this version, if an OUT has
    it still. Only plans, commits and the files `MergedOutput.held` are read. ConfigError: a source shard has another
    content than in the index, or in an earlier OUT, and not `replace`; or it has, and OUT lacks partitions of it.
    """
    places = Places()
    of_base = held.read_sources(index, base) if base else []
    if base:
        _check_embedded_again(sources, index, base, of_base)
    commits = {one.commit for slices in of_base for one in slices}
    if base and base.replaced and replace:  # what was replaced may come back
        content = _last([_contents(of_one, places) for of_one in of_base])
        commits -= {one.commit for each in of_base for one in each if one.content.differs(content[places.of(one.url)])}
    restricted, known = [], []
    for source in sources:
        new = [commit for commit in source.commits if held.commit_digest(commit) not in commits]
        commits.update(map(held.commit_digest, new))
        known.append(source.rows - sum(commit.rows for commit in new))
        restricted.append(source.only(new))
    slices = [held.slices_of(source) for source in restricted]
    contents = [_contents(of_one, places) for of_one in slices]
    touched = {place for of_one in contents for place in of_one}
    base_each = [_contents([one for one in of_one if places.of(one.url) in touched], places) for of_one in of_base]
    base_last = _last(base_each)
    last = _last([base_last, *contents])
    settled = _last([_contents(of_one, places) for of_one in held.read_sources(index, like)]) if like else {}
    for place, known_content in settled.items():
        if known_content.size is not None and any(of_one.get(place) == known_content for of_one in contents):
            last[place] = known_content
    shared_places = [place for place in last if (place in base_last) + sum(place in of_one for of_one in contents) > 1]
    shared = {place: number for number, place in enumerate(shared_places)}
    urls = [source.store.url for source in sources]
    before = [(f"index version {base.version}" if base else "", base_last), *zip(urls, contents, strict=True)]
    _check_contents(sources, slices, before, last, replace, places)

    def loses(own: Contents) -> npt.NDArray[np.bool_]:
        return np.array([place in own and own[place].differs(last[place]) for place in shared], dtype=np.bool_)

    mixed = {place for of_one in base_each for place, content in of_one.items() if content.differs(base_last[place])}
    return Outputs(tuple(restricted)), Overlap(
        shared,
        frozenset(number for number, of_one in enumerate(base_each) if not shared.keys().isdisjoint(of_one)),
        loses(base_last),
        tuple(map(loses, contents)),
        frozenset(mixed),
        tuple(frozenset(one.partition for one in of_one if places.of(one.url) in shared) for of_one in slices),
        tuple(known),
    )


def find(overlap: Overlap, source: Outputs, index: Store, base: Manifest | None) -> LeftOut:
    """Compare the rows of the shared source shards. Memory: some 120 bytes for each of these rows of one side."""
    places, shared, ordered = Places(), overlap.shared, np.array(list(overlap.shared), dtype=object)
    pieces: list[Names] = [np.empty((0, 2), dtype=np.uint64)]
    replaced = [np.empty(0, dtype=np.int64)]
    if base and overlap.base_sources:
        dead = replaced_ids(index, base)
        for table, ids in held.named_rows(index, base, set(overlap.base_sources)):
            rows, numbers = held.select(table, places, shared)
            alive = ~contains(dead, ids[rows])
            rows, numbers = rows[alive], numbers[alive]
            loses = overlap.base_loses[numbers]
            replaced.append(ids[rows[loses]])
            pieces.append(held.names_of(table, rows[~loses], ordered[numbers[~loses]].tolist()))
        settled = {
            place: number
            for place, number in shared.items()
            if place not in overlap.mixed and not overlap.base_loses[number]
        }
        for table in held.dropped_duplicates(index, base):
            rows, numbers = held.select(table, places, settled)
            pieces.append(held.names_of(table, rows, ordered[numbers].tolist()))
    known = held.numbered(np.concatenate(pieces))
    left_out, standing = [np.empty(0, dtype=np.int64)], []
    for number, start in enumerate(source.starts[:-1]):
        older, rows, names = _rows(overlap, source.sources[number], number, places, ordered)
        stand = held.are_in(names, known)
        left_out += [start + older, start + rows[stand]]
        standing.append(int(stand.sum()))
        known = np.concatenate([known, names[~stand]])
    return LeftOut(np.sort(np.concatenate(left_out)), np.sort(np.concatenate(replaced)), tuple(standing))


def _rows(
    overlap: Overlap, source: Embeddings, number: int, places: Places, ordered: npt.NDArray[np.object_]
) -> tuple[Rows, Rows, Names]:
    """The rows of shared source shards of one OUT: those of an older content; the other ones; and their names."""
    older, kept = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    names: list[Names] = [np.empty((0, 2), dtype=np.uint64)]
    for commit, first in zip(source.commits, source.starts, strict=False):
        if commit.partition not in overlap.parts[number]:
            continue
        for each in source.scan_metadata(commit, list(held.COLUMNS), None):
            table = held.with_shards(each, source)
            rows, numbers = held.select(table, places, overlap.shared)
            loses = overlap.loses[number][numbers]
            of_part = first + table["row"].to_numpy().astype(np.int64)
            older.append(of_part[rows[loses]])
            kept.append(of_part[rows[~loses]])
            names.append(held.names_of(table, rows[~loses], ordered[numbers[~loses]].tolist()))
    return np.concatenate(older), np.concatenate(kept), held.numbered(np.concatenate(names))


def _contents(slices: Sequence[HeldSlice], places: Places) -> Contents:
    return {places.of(one.url): one.content for one in slices}


def _last(contents: Sequence[Contents]) -> Contents:
    """The latest content of each source shard that is known."""
    last: Contents = {}
    for of_one in contents:
        for place, content in of_one.items():
            if content.size is not None or place not in last:
                last[place] = content
    return last


def _check_embedded_again(
    sources: Sequence[Embeddings], index: Store, base: Manifest, of_base: Sequence[Sequence[HeldSlice]]
) -> None:
    """ConfigError where a partition of pictures was embedded again since the index got its rows."""
    for source in sources:
        merged = [of_one for one, of_one in zip(base.sources, of_base, strict=False) if one.output == source.store.url]
        if again := held.embedded_again(source, itertools.chain(*merged)):
            what = f"{source.store.url} has embedded partitions {format_numbers(again)} again"
            remedy = f"clip-batch merge --anew --index {quote(index.url)} takes the new ones"
            raise ConfigError(f"{what} since version {base.version} got their rows: {remedy}")


def _check_contents(
    sources: Sequence[Embeddings],
    slices: Sequence[Sequence[HeldSlice]],
    before: Sequence[tuple[str, Contents]],
    last: Contents,
    replace: bool,
    places: Places,
) -> None:
    """ConfigError where a source shard has several contents that may not, or cannot, replace one another.

    `before` names the index, and each OUT, and has their contents.
    """
    changed = {place: at for at in before for place, content in at[1].items() if content.differs(last[place])}
    for source, of_one in zip(sources, slices, strict=True):
        newer = {one.url: one for one in of_one if places.of(one.url) in changed}
        newer = {url: one for url, one in newer.items() if not one.content.differs(last[places.of(url)])}
        if not newer:
            continue
        url, one = next(iter(newer.items()))
        where, contents = changed[places.of(url)]
        if not replace:
            raise ConfigError(
                f"{source.store.url} has {some(list(newer), 3)} with another content ({url}: {one.content}) than "
                f"{where} ({contents[places.of(url)]}): merge with --replace to put the new rows in their place"
            )
        lacking = [
            partition
            for partition in source.missing
            if any(name_text(piece.shard.url) in newer for piece in source.plan.partitions[partition].slices)
        ]
        if lacking:
            replacing = f"which have rows of {some(list(newer), 3)} that are to replace earlier ones"
            raise ConfigError(
                f"{source.store.url} lacks partitions {format_numbers(lacking)}, {replacing}: "
                f"run clip-batch embed --output {quote(source.store.url)} first"
            )


def describe(left_out: LeftOut, overlap: Overlap, rows: int) -> list[str]:
    """Lines about what is left out of `rows` rows that were compared, for people."""
    known = sum(overlap.known)
    standing, older = sum(left_out.standing), len(left_out.rows) - sum(left_out.standing)
    lines = []
    if known or standing:
        new = rows - len(left_out.rows)
        lines.append(f"{counted(known + standing, 'row')} stand already and are not added again; {new:,} are new")
    if older:
        lines.append(f"{counted(older, 'row')} of an older content are left out")
    if len(left_out.replaced):
        lines.append(f"{counted(len(left_out.replaced), 'row')} of the index are replaced")
    return lines
